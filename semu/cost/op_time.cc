#include "semu/cost/op_time.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "semu/base/check.h"
#include "semu/cost/ops/op_factors.h"
#include "semu/cost/ops/op_rules.h"

namespace pipeweaver::semu {
namespace {

// Counts changes of the rules below.
constexpr int kVersion = 1;

class Timer {
 public:
  // `fitted` may be null.
  Timer(const Platform& platform, const RooflineFactors& factors,
        const DeviceFactors* fitted)
      : platform_(platform),
        factors_(factors),
        fitted_(fitted),
        figures_{static_cast<double>(platform.device.peak_flops_per_second),
                 static_cast<double>(
                     platform.device.memory_bandwidth_bytes_per_second)} {}

  double Ns(const Op& op) const {
    switch (op.kind) {
      case OpKind::kMatmul:
        return MatmulNs(op);
      case OpKind::kAttention:
        return ComputeNs(op);
      case OpKind::kElementwise:
        return fitted_ == nullptr ? ComputeNs(op)
                                  : 1e3 * MemoryOpUs(*fitted_, figures_,
                                                     op.memory_kind, op.bytes);
      case OpKind::kCollective:
        return CollectiveNs(op);
      case OpKind::kRingTransfer:
        return LinkNs(op.kind, static_cast<double>(op.bytes),
                      platform_.links.tensor_parallel);
      case OpKind::kHostCopy:
        return LinkNs(op.kind, static_cast<double>(op.bytes),
                      platform_.links.host);
    }
    PW_CHECK(false && "unknown kind of operation");
  }

 private:
  const OpFactors& FactorsOf(OpKind kind) const {
    return factors_[static_cast<int>(kind)];
  }

  double ComputeNs(const Op& op) const {
    const OpFactors& f = FactorsOf(op.kind);
    const double compute =
        op.flops / (f.flops_efficiency * figures_.peak_flops_per_s);
    const double memory = static_cast<double>(op.bytes) /
                          (f.memory_efficiency * figures_.memory_bytes_per_s);
    return std::max(compute, memory) * 1e9 + f.launch_ns;
  }

  double MatmulNs(const Op& op) const {
    if (fitted_ == nullptr || platform_.data_type == DataType::kFp32 ||
        op.flops <= 0) {
      return ComputeNs(op);
    }
    const OpFactors& f = FactorsOf(op.kind);
    const double memory_ns =
        static_cast<double>(op.bytes) * 1e9 /
            (f.memory_efficiency * figures_.memory_bytes_per_s) +
        f.launch_ns;
    return std::max(memory_ns, 1e3 * MatmulUs(*fitted_, figures_, op.rows,
                                              op.columns, op.inner, op.role));
  }

  double CollectiveNs(const Op& op) const {
    const Link& link = platform_.links.tensor_parallel;
    const int gpus = platform_.parallelism.tensor_parallel;
    const bool all_reduce = op.collective == CollectiveOpKind::kAllReduce;
    const double ring_ns =
        LinkNs(op.kind,
               (all_reduce ? 2 : 1) * static_cast<double>(op.bytes) *
                   (gpus - 1) / gpus,
               link);
    if (fitted_ == nullptr || gpus > platform_.links.gpus_per_node) {
      return ring_ns;
    }
    const auto us = CollectiveUs(
        *fitted_, static_cast<double>(link.bandwidth_bytes_per_second),
        op.collective, gpus, op.bytes);
    if (!us.ok()) return ring_ns;
    // Half an all-reduce stands in for a gather or scatter. A switch that sums
    // makes all-reduces faster than a ring, which they do not gain from.
    return all_reduce ? *us * 1e3 : std::max(*us * 1e3, ring_ns);
  }

  // A link without a bandwidth is not used.
  double LinkNs(OpKind kind, double bytes, const Link& link) const {
    if (link.bandwidth_bytes_per_second == 0) return 0;
    const OpFactors& f = FactorsOf(kind);
    return bytes * 1e9 /
               (f.network_efficiency *
                static_cast<double>(link.bandwidth_bytes_per_second)) +
           f.launch_ns + static_cast<double>(link.latency_ns);
  }

  const Platform& platform_;
  const RooflineFactors& factors_;
  const DeviceFactors* const fitted_;
  const DeviceFigures figures_;
};

// std::llround of what is not negative, and cheaper.
int64_t Rounded(double ns) {
  const auto whole = static_cast<int64_t>(ns);
  return whole + (ns - static_cast<double>(whole) >= 0.5 ? 1 : 0);
}

// Each entry stands for itself: exact, in a fixed order, with a separator.
void Add(std::string* out, std::initializer_list<double> values) {
  for (const double value : values) {
    absl::StrAppend(out, absl::StrFormat("%a,", value));
  }
}

void AddLink(std::string* out, const Link& link) {
  absl::StrAppend(out, link.latency_ns, ",", link.bandwidth_bytes_per_second,
                  ",");
}

void AddFitted(std::string* out, const DeviceFactors& device, OpKind kind) {
  switch (kind) {
    case OpKind::kMatmul: {
      const MatmulFactors& f = device.matmul;
      absl::StrAppend(out, device.sm_count, ",");
      Add(out, {f.peak_fraction, f.extra_inner});
      for (const double efficiency : f.tile_efficiency) Add(out, {efficiency});
      Add(out, {f.wave_rounding, f.sustained_slowdown, f.sustained_time_us,
                f.bandwidth_fraction, f.launch_us, f.split_cost,
                f.attention_output_rate, f.ffn_down_rate});
      break;
    }
    case OpKind::kElementwise:
      for (const MemoryOpFactors& f : device.memory_ops) {
        Add(out,
            {f.launch_us, f.memory_fraction, f.cache_fraction, f.cache_bytes});
      }
      break;
    case OpKind::kCollective:
      Add(out, {device.link_bytes_per_s});
      for (const CollectiveFactors& f : device.collectives) {
        absl::StrAppend(out, static_cast<int>(f.kind), ",", f.workers, ",",
                        f.devices_per_node, ",");
        Add(out, {f.latency_us, f.root_us, f.us_per_mb});
      }
      break;
    case OpKind::kAttention:
    case OpKind::kRingTransfer:
    case OpKind::kHostCopy:
      break;
  }
}

}  // namespace

void DeviceOpTimes::TimeOps(const Platform& platform, absl::Span<const Op> ops,
                            absl::Span<int64_t> op_ns) const {
  PW_CHECK(ops.size() == op_ns.size());
  const RooflineFactors factors =
      fixed_ ? factors_ : DefaultFactors(platform.device.name);
  const DeviceFactors* const fitted =
      fixed_ ? nullptr : FindDeviceFactors(platform.device.name);
  const Timer timer(platform, factors, fitted);
  for (size_t i = 0; i < ops.size(); ++i) {
    op_ns[i] = Rounded(std::min(timer.Ns(ops[i]), kMaxOpNs));
  }
}

std::string DeviceOpTimes::Entries(const Platform& platform,
                                   const OpKinds& kinds) const {
  const RooflineFactors factors =
      fixed_ ? factors_ : DefaultFactors(platform.device.name);
  const DeviceFactors* const fitted =
      fixed_ ? nullptr : FindDeviceFactors(platform.device.name);
  std::string entries = absl::StrCat(
      "device ", kVersion, ";", platform.device.peak_flops_per_second, ",",
      platform.device.memory_bandwidth_bytes_per_second, ";");
  for (int k = 0; k < kNumOpKinds; ++k) {
    if (!kinds[k]) continue;
    const auto kind = static_cast<OpKind>(k);
    const OpFactors& f = factors[k];
    absl::StrAppend(&entries, k, ":");
    Add(&entries, {f.flops_efficiency, f.memory_efficiency,
                   f.network_efficiency, f.launch_ns});
    if (kind == OpKind::kCollective) {
      absl::StrAppend(
          &entries,
          platform.parallelism.tensor_parallel <= platform.links.gpus_per_node,
          ",");
    }
    if (kind == OpKind::kCollective || kind == OpKind::kRingTransfer) {
      AddLink(&entries, platform.links.tensor_parallel);
    }
    if (kind == OpKind::kHostCopy) AddLink(&entries, platform.links.host);
    if (fitted != nullptr) {
      absl::StrAppend(&entries, "fitted,");
      AddFitted(&entries, *fitted, kind);
    }
  }
  return entries;
}

std::string DeviceOpTimes::Fingerprint() const {
  std::string fingerprint = absl::StrCat("device ", kVersion);
  if (fixed_) {
    for (const OpFactors& f : factors_) {
      absl::StrAppend(&fingerprint, " ");
      Add(&fingerprint, {f.flops_efficiency, f.memory_efficiency,
                         f.network_efficiency, f.launch_ns});
    }
  }
  return fingerprint;
}

}  // namespace pipeweaver::semu
