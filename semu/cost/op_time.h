// Times of operations: the one place where a user's own rule goes in.

#ifndef SEMU_COST_OP_TIME_H_
#define SEMU_COST_OP_TIME_H_

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/roofline_factors.h"
#include "semu/graph/op_graph.h"
#include "semu/graph/subgraph_key.h"

namespace pipeweaver::semu {

// No operation takes longer, in ns, so that sums stay within int64.
inline constexpr double kMaxOpNs = 1e14;

// To override a rule, derive from this, hold another OpTimeRules, let it fill
// in `op_ns`, and overwrite the operations meant. Implementations are immutable
// and thread-safe.
class OpTimeRules {
 public:
  virtual ~OpTimeRules() = default;

  // Fills in op_ns[i], 0 .. kMaxOpNs, for ops[i]: pure functions of the
  // arguments and of Entries(). REQUIRES: equal lengths.
  virtual void TimeOps(const Platform& platform, absl::Span<const Op> ops,
                       absl::Span<int64_t> op_ns) const = 0;

  // Bytes that tell what times operations of `kinds` on `platform`, its figures
  // included, from anything that gives other times.
  virtual std::string Entries(const Platform& platform,
                              const OpKinds& kinds) const = 0;

  // Bytes that tell these rules from any others, whatever the platform.
  virtual std::string Fingerprint() const = 0;
};

// The rules fitted to a device (ops/op_rules.h) where there are any: of matmuls
// at 16 bit, of kernels bound by memory, and of collectives inside a node, at
// the job's own peak and bandwidths. For all else the roofline: the largest of
// what arithmetic, memory traffic and network traffic need at the factors'
// share of the nominal figures, plus a launch, plus a link's latency.
class DeviceOpTimes : public OpTimeRules {
 public:
  // Takes DefaultFactors of each platform's device.
  DeviceOpTimes() = default;
  // Takes `factors` and the roofline for every device and operation.
  explicit DeviceOpTimes(const RooflineFactors& factors)
      : factors_(factors), fixed_(true) {}

  void TimeOps(const Platform& platform, absl::Span<const Op> ops,
               absl::Span<int64_t> op_ns) const override;
  std::string Entries(const Platform& platform,
                      const OpKinds& kinds) const override;
  std::string Fingerprint() const override;

 private:
  RooflineFactors factors_;
  bool fixed_ = false;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OP_TIME_H_
