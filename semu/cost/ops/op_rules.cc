// Time of one op from its shape alone.

#include "semu/cost/ops/op_rules.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "absl/strings/str_cat.h"

namespace pipeweaver::semu {
namespace {

constexpr double kBytesPerElement = 2;
constexpr double kMaxCollectiveBytes = 1e18;

double FourthPower(double x) { return x * x * x * x; }

double RoleRate(const MatmulFactors& factors, MatmulRole role) {
  switch (role) {
    case MatmulRole::kGeneral:
      return 1;
    case MatmulRole::kAttentionOutput:
      return factors.attention_output_rate;
    case MatmulRole::kFfnDown:
      return factors.ffn_down_rate;
  }
  return 1;
}

// [size class]: the fewest tiles of it that cover rows x columns. Tiles of a
// class differ in their outlines alone, so the fewest take the least time.
std::array<double, kNumTileClasses> FewestTiles(double rows, double columns) {
  std::array<double, kNumTileClasses> fewest;
  fewest.fill(std::numeric_limits<double>::infinity());
  // Unrolled, the counts of equal rows and columns are taken once.
#pragma GCC unroll 8
  for (const Tile& tile : kTiles) {
    double& tiles = fewest[tile.size_class];
    tiles = std::min(
        tiles, std::ceil(rows / static_cast<double>(tile.rows)) *
                   std::ceil(columns / static_cast<double>(tile.columns)));
  }
  return fewest;
}

// [size class]
constexpr std::array<double, kNumTileClasses> kTileFlopsPerInner = [] {
  std::array<double, kNumTileClasses> flops = {};
  for (const Tile& tile : kTiles) {
    flops[tile.size_class] =
        2.0 * static_cast<double>(tile.rows * tile.columns);
  }
  return flops;
}();

// Share of the tensor that a GPU sends in a ring, both phases of an all-reduce.
double RingShare(CollectiveOpKind kind, double workers) {
  return kind == CollectiveOpKind::kAllReduce     ? 2 * (workers - 1) / workers
         : kind == CollectiveOpKind::kSendReceive ? 1
                                                  : (workers - 1) / workers;
}

}  // namespace

double MatmulUs(const DeviceFactors& device, int64_t rows, int64_t columns,
                int64_t inner, MatmulRole role) {
  return MatmulUs(device, {device.peak_flops_per_s, device.memory_bytes_per_s},
                  rows, columns, inner, role);
}

double MatmulUs(const DeviceFactors& device, const DeviceFigures& figures,
                int64_t rows, int64_t columns, int64_t inner, MatmulRole role) {
  const MatmulFactors& factors = device.matmul;
  const double sms = static_cast<double>(device.sm_count);
  const double sm_flops_per_us = figures.peak_flops_per_s * 1e-6 / sms *
                                 factors.peak_fraction *
                                 RoleRate(factors, role);
  const double bytes_per_us = figures.memory_bytes_per_s * 1e-6;
  const double m = static_cast<double>(rows);
  const double n = static_cast<double>(columns);
  const double k = static_cast<double>(inner);

  const std::array<double, kNumTileClasses> fewest_tiles = FewestTiles(m, n);
  double compute_us = std::numeric_limits<double>::infinity();
  // Of the classes, for one of `inner` in waves that are all full.
  double least_full_us = std::numeric_limits<double>::infinity();
  for (const int split : {1, 2, 4}) {
    const double inner_of_split = k / split + factors.extra_inner;
    // Partial sums are 32 bit; summing them is a kernel of its own.
    const double sum_us =
        split == 1 ? 0
                   : factors.split_cost * split * m * n * 4 / bytes_per_us + 1;
    // Not even full waves would do; the margin is far above all rounding.
    const double bound_us = split * least_full_us * inner_of_split + sum_us;
    if (split > 1 && bound_us * (1 - 1e-9) >= compute_us) continue;
    for (int c = 0; c < kNumTileClasses; ++c) {
      const double exact_waves = fewest_tiles[c] * split / sms;
      const double waves =
          exact_waves <= 1 ? 1
                           : (1 - factors.wave_rounding) * exact_waves +
                                 factors.wave_rounding * std::ceil(exact_waves);
      const double rate = sm_flops_per_us * factors.tile_efficiency[c];
      const double us =
          waves * kTileFlopsPerInner[c] * inner_of_split / rate + sum_us;
      compute_us = std::min(compute_us, us);
      if (split == 1) {
        least_full_us =
            std::min(least_full_us, exact_waves * kTileFlopsPerInner[c] / rate);
      }
    }
  }
  compute_us *= 1 + factors.sustained_slowdown *
                        -std::expm1(-compute_us / factors.sustained_time_us);
  const double memory_us = kBytesPerElement * (m * k + k * n + m * n) /
                           (bytes_per_us * factors.bandwidth_fraction);
  return factors.launch_us +
         std::sqrt(std::sqrt(FourthPower(compute_us) + FourthPower(memory_us)));
}

double MemoryOpUs(const DeviceFactors& device, MemoryOpKind kind,
                  int64_t bytes) {
  return MemoryOpUs(device,
                    {device.peak_flops_per_s, device.memory_bytes_per_s}, kind,
                    bytes);
}

double MemoryOpUs(const DeviceFactors& device, const DeviceFigures& figures,
                  MemoryOpKind kind, int64_t bytes) {
  const MemoryOpFactors& factors = device.memory_ops[static_cast<int>(kind)];
  const double bytes_per_us = figures.memory_bytes_per_s * 1e-6;
  const double hit_share =
      1 / (1 + FourthPower(static_cast<double>(bytes) / factors.cache_bytes));
  const double us_at_full_bandwidth = static_cast<double>(bytes) / bytes_per_us;
  return factors.launch_us +
         us_at_full_bandwidth * (hit_share / factors.cache_fraction +
                                 (1 - hit_share) / factors.memory_fraction);
}

absl::StatusOr<double> CollectiveUs(const DeviceFactors& device,
                                    CollectiveOpKind kind, int workers,
                                    int devices_per_node, int64_t bytes) {
  if (workers <= 1) return 0.0;
  const bool crosses = devices_per_node < workers;
  const CollectiveFactors* below = nullptr;
  const CollectiveFactors* above = nullptr;
  const auto search = [&](CollectiveOpKind wanted) {
    for (const CollectiveFactors& entry : device.collectives) {
      if (entry.kind != wanted ||
          (entry.devices_per_node < entry.workers) != crosses)
        continue;
      // Across nodes, entries of other node sizes only stand in where none
      // fits.
      const auto better = [&](const CollectiveFactors* have) {
        if (have == nullptr || !crosses || have->workers != entry.workers)
          return true;
        return std::abs(entry.devices_per_node - devices_per_node) <
               std::abs(have->devices_per_node - devices_per_node);
      };
      if (entry.workers <= workers &&
          (below == nullptr || entry.workers >= below->workers) &&
          better(below)) {
        below = &entry;
      }
      if (entry.workers >= workers &&
          (above == nullptr || entry.workers <= above->workers) &&
          better(above)) {
        above = &entry;
      }
    }
  };
  search(kind);
  double share_of_all_reduce = 1;
  if (below == nullptr && above == nullptr &&
      kind != CollectiveOpKind::kSendReceive) {
    search(CollectiveOpKind::kAllReduce);
    share_of_all_reduce = 0.5;
  }
  if (below == nullptr && above == nullptr) {
    return absl::NotFoundError(absl::StrCat(
        "device ", device.name, " has no factors for ",
        crosses ? "transfers across nodes" : "transfers inside a node",
        " of this kind"));
  }
  const double mb = static_cast<double>(bytes) * 1e-6;
  const double root_mb = std::sqrt(mb);
  const double ring_share = RingShare(kind, workers);
  const auto entry_share = [kind](const CollectiveFactors& entry) {
    return RingShare(kind, entry.workers);
  };
  const auto time = [&](double latency_us, double root_us, double us_per_mb) {
    return share_of_all_reduce *
           (latency_us + root_us * root_mb + us_per_mb * mb);
  };
  if (below != nullptr && above != nullptr) {
    if (below->workers == above->workers) {
      return time(below->latency_us, below->root_us, below->us_per_mb);
    }
    const double weight =
        std::log(static_cast<double>(workers) / below->workers) /
        std::log(static_cast<double>(above->workers) / below->workers);
    const auto mix = [weight](double a, double b) {
      return a + weight * (b - a);
    };
    const double bus = mix(entry_share(*below) / below->us_per_mb,
                           entry_share(*above) / above->us_per_mb);
    return time(mix(below->latency_us, above->latency_us),
                mix(below->root_us, above->root_us), ring_share / bus);
  }
  const CollectiveFactors& nearest = below != nullptr ? *below : *above;
  const double growth =
      crosses ? static_cast<double>(workers) / nearest.workers : 1;
  return time(nearest.latency_us * growth, nearest.root_us * std::sqrt(growth),
              nearest.us_per_mb * ring_share / entry_share(nearest));
}

absl::StatusOr<double> CollectiveUs(const DeviceFactors& device,
                                    double link_bytes_per_s,
                                    CollectiveOpKind kind, int workers,
                                    int64_t bytes) {
  const double at_nominal =
      static_cast<double>(bytes) * device.link_bytes_per_s / link_bytes_per_s;
  return CollectiveUs(
      device, kind, workers, /*devices_per_node=*/workers,
      static_cast<int64_t>(std::min(at_nominal, kMaxCollectiveBytes)));
}

}  // namespace pipeweaver::semu
