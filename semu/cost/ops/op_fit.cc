// Fits the op rules' factors to measured ops of one device.

#include "semu/cost/ops/op_fit.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "semu/cost/ops/least_squares.h"
#include "semu/cost/ops/op_rules.h"

namespace pipeweaver::semu {
namespace {

// Times are medians in whole or half microseconds: short ones say less.
constexpr double kCoarseUs = 15;
constexpr double kCoarseWeight = 0.4;
// Training runs thousands of tokens; fewer still pin the launch cost.
constexpr int64_t kFullWeightRows = 1024;
constexpr double kFewRowsWeight = 0.4;
constexpr int64_t kMinCollectiveBytes = 1'000'000;

struct MatmulSample {
  MatmulOp op;
  double measured_us;
  double weight;
};

struct SizeSample {
  int64_t bytes;
  double measured_us;
  double weight;
};

// A factor with the range in which it still means something.
struct MatmulParameter {
  double MatmulFactors::*member;
  double low;
  double high;
};

constexpr MatmulParameter kMatmulParameters[] = {
    {&MatmulFactors::peak_fraction, 0.3, 1.2},
    {&MatmulFactors::extra_inner, 0, 1000},
    {&MatmulFactors::wave_rounding, 0, 1},
    {&MatmulFactors::sustained_slowdown, 0, 0.8},
    {&MatmulFactors::sustained_time_us, 10, 100'000},
    {&MatmulFactors::bandwidth_fraction, 0.3, 1},
    {&MatmulFactors::launch_us, 0, 10},
    {&MatmulFactors::split_cost, 0, 8},
    {&MatmulFactors::attention_output_rate, 0.7, 1.3},
    {&MatmulFactors::ffn_down_rate, 0.7, 1.3},
};
constexpr double kLowestTileEfficiency = 0.2;
constexpr double kHighestTileEfficiency = 1.1;

MatmulFactors MatmulFromValues(const std::vector<double>& values) {
  MatmulFactors factors;
  std::size_t next = 0;
  for (const MatmulParameter& parameter : kMatmulParameters) {
    factors.*parameter.member = values[next++];
  }
  factors.tile_efficiency[0] = 1;
  for (int i = 1; i < kNumTileClasses; ++i)
    factors.tile_efficiency[i] = values[next++];
  return factors;
}

MatmulFactors FitMatmul(DeviceFactors device,
                        const std::vector<MatmulSample>& samples) {
  std::vector<Parameter> parameters;
  for (const MatmulParameter& parameter : kMatmulParameters) {
    parameters.push_back(
        {device.matmul.*parameter.member, parameter.low, parameter.high});
  }
  for (int i = 1; i < kNumTileClasses; ++i) {
    parameters.push_back({device.matmul.tile_efficiency[i],
                          kLowestTileEfficiency, kHighestTileEfficiency});
  }
  const LeastSquaresResult result = MinimizeSquares(
      parameters,
      [&](const std::vector<double>& values, std::vector<double>& residuals) {
        device.matmul = MatmulFromValues(values);
        residuals.resize(samples.size());
        for (std::size_t i = 0; i < samples.size(); ++i) {
          const MatmulOp& op = samples[i].op;
          residuals[i] =
              samples[i].weight * std::log(MatmulUs(device, op.rows, op.columns,
                                                    op.inner, op.role) /
                                           samples[i].measured_us);
        }
      });
  return MatmulFromValues(result.values);
}

MemoryOpFactors FitMemoryOp(DeviceFactors device, MemoryOpKind kind,
                            const std::vector<SizeSample>& samples) {
  MemoryOpFactors& factors = device.memory_ops[static_cast<int>(kind)];
  const auto set = [&factors](const std::vector<double>& values) {
    factors = {values[0], values[1], values[2], values[3] * 1e6};
  };
  const LeastSquaresResult result = MinimizeSquares(
      {{factors.launch_us, 0, 10},
       {factors.memory_fraction, 0.05, 1.2},
       {factors.cache_fraction, 0.05, 6},
       {factors.cache_bytes * 1e-6, 5, 200}},
      [&](const std::vector<double>& values, std::vector<double>& residuals) {
        set(values);
        residuals.resize(samples.size());
        for (std::size_t i = 0; i < samples.size(); ++i) {
          residuals[i] =
              samples[i].weight *
              std::log(
                  std::max(MemoryOpUs(device, kind, samples[i].bytes), 1e-3) /
                  samples[i].measured_us);
        }
      });
  set(result.values);
  return factors;
}

void FitCollective(const std::vector<SizeSample>& samples,
                   CollectiveFactors* factors) {
  const LeastSquaresResult result = MinimizeSquares(
      {{20, 0, 1e4}, {1, 0, 1e4}, {5, 1e-3, 1e4}},
      [&](const std::vector<double>& values, std::vector<double>& residuals) {
        residuals.resize(samples.size());
        for (std::size_t i = 0; i < samples.size(); ++i) {
          const double mb = static_cast<double>(samples[i].bytes) * 1e-6;
          residuals[i] = std::log(
              (values[0] + values[1] * std::sqrt(mb) + values[2] * mb) /
              samples[i].measured_us);
        }
      });
  factors->latency_us = result.values[0];
  factors->root_us = result.values[1];
  factors->us_per_mb = result.values[2];
}

}  // namespace

DeviceFactors FitFactors(const DeviceFactors& start,
                         const std::vector<const OpRow*>& rows) {
  std::vector<MatmulSample> matmuls;
  std::array<std::vector<SizeSample>, kNumMemoryOpKinds> memory_ops;
  // Kind, crossing nodes, workers, devices per node: the order of the factors.
  std::map<std::tuple<int, bool, int, int>, std::vector<SizeSample>>
      collectives;
  for (const OpRow* row : rows) {
    for (const OpCell& cell : row->cells) {
      if (!cell.measured_us || *cell.measured_us <= 0) continue;
      const double us = *cell.measured_us;
      const double coarse = us < kCoarseUs ? kCoarseWeight : 1;
      if (const auto* matmul = std::get_if<MatmulOp>(&cell.op)) {
        const double few = matmul->rows < kFullWeightRows ? kFewRowsWeight : 1;
        matmuls.push_back({*matmul, us, coarse * few});
      } else if (const auto* memory = std::get_if<MemoryOp>(&cell.op)) {
        memory_ops[static_cast<int>(memory->kind)].push_back(
            {memory->bytes, us, coarse});
      } else {
        const auto& collective = std::get<CollectiveOp>(cell.op);
        if (collective.bytes < kMinCollectiveBytes) continue;
        collectives[{static_cast<int>(collective.kind),
                     collective.devices_per_node < collective.workers,
                     collective.workers, collective.devices_per_node}]
            .push_back({collective.bytes, us, 1});
      }
    }
  }

  DeviceFactors fitted = start;
  if (!matmuls.empty()) fitted.matmul = FitMatmul(start, matmuls);
  for (int kind = 0; kind < kNumMemoryOpKinds; ++kind) {
    if (memory_ops[kind].empty()) continue;
    fitted.memory_ops[kind] =
        FitMemoryOp(start, static_cast<MemoryOpKind>(kind), memory_ops[kind]);
  }
  if (!collectives.empty()) {
    fitted.collectives.clear();
    for (const auto& [key, samples] : collectives) {
      CollectiveFactors factors;
      factors.kind = static_cast<CollectiveOpKind>(std::get<0>(key));
      factors.workers = std::get<2>(key);
      factors.devices_per_node = std::get<3>(key);
      FitCollective(samples, &factors);
      fitted.collectives.push_back(factors);
    }
  }
  return fitted;
}

std::string FactorsSource(const DeviceFactors& factors) {
  static constexpr const char* kCollectiveNames[] = {
      "kAllReduce", "kAllGather", "kReduceScatter", "kSendReceive"};
  const auto number = [](double value) {
    return absl::StrFormat("%.4g", value);
  };
  const MatmulFactors& m = factors.matmul;
  std::string tiles;
  for (const double efficiency : m.tile_efficiency) {
    absl::StrAppend(&tiles, tiles.empty() ? "" : ", ", number(efficiency));
  }
  std::string out = absl::StrCat(
      "{.name = \"", factors.name, "\",\n .sm_count = ", factors.sm_count,
      ",\n .peak_flops_per_s = ", number(factors.peak_flops_per_s),
      ",\n .memory_bytes_per_s = ", number(factors.memory_bytes_per_s),
      ",\n .matmul = {.peak_fraction = ", number(m.peak_fraction),
      ", .extra_inner = ", number(m.extra_inner), ", .tile_efficiency = {",
      tiles, "}, .wave_rounding = ", number(m.wave_rounding),
      ", .sustained_slowdown = ", number(m.sustained_slowdown),
      ", .sustained_time_us = ", number(m.sustained_time_us),
      ", .bandwidth_fraction = ", number(m.bandwidth_fraction),
      ", .launch_us = ", number(m.launch_us),
      ", .split_cost = ", number(m.split_cost),
      ", .attention_output_rate = ", number(m.attention_output_rate),
      ", .ffn_down_rate = ", number(m.ffn_down_rate), "},\n .memory_ops = {{");
  std::vector<std::string> memory_ops;
  for (const MemoryOpFactors& op : factors.memory_ops) {
    memory_ops.push_back(absl::StrCat(
        "{", number(op.launch_us), ", ", number(op.memory_fraction), ", ",
        number(op.cache_fraction), ", ", number(op.cache_bytes), "}"));
  }
  std::vector<std::string> collectives;
  for (const CollectiveFactors& c : factors.collectives) {
    collectives.push_back(absl::StrCat(
        "{CollectiveOpKind::", kCollectiveNames[static_cast<int>(c.kind)], ", ",
        c.workers, ", ", c.devices_per_node, ", ", number(c.latency_us), ", ",
        number(c.root_us), ", ", number(c.us_per_mb), "}"));
  }
  return absl::StrCat(out, absl::StrJoin(memory_ops, ", "),
                      "}},\n .collectives = {",
                      absl::StrJoin(collectives, ", "), "}}");
}

}  // namespace pipeweaver::semu
