// Analytic costs: every operation of a layer takes the largest of what its
// arithmetic, its memory traffic and its network traffic need, plus a launch.

#ifndef SEMU_COST_ROOFLINE_COST_H_
#define SEMU_COST_ROOFLINE_COST_H_

#include <array>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "semu/cost/cost_model.h"

namespace pipeweaver::semu {

enum class OpKind { kMatmul, kAttention, kElementwise, kCollective };
inline constexpr int kNumOpKinds = 4;

// What an operation of a kind reaches of the device's figures, 0 .. 1.
struct OpFactors {
  double flops_efficiency = 1;
  double memory_efficiency = 1;
  double network_efficiency = 1;
  double launch_ns = 0;
};

using RooflineFactors = std::array<OpFactors, kNumOpKinds>;

// Factors for a device by name; those of Hopper GPUs for a name not known.
RooflineFactors DefaultFactors(absl::string_view device_name);

// What is modelled: tensor parallelism with sequence parallelism (all-gather
// before and reduce-scatter behind each pair of matrices, not overlapped; the
// weight gradient gathers its input again), context parallelism (keys and
// values go round a ring under the attention), flash attention, whose backward
// does 2.5 times the arithmetic of its forward, weight gradients summed in
// fp32. The weight gradient apart from the input gradient reads and writes the
// gradients between the matrices once more.
class RooflineCost : public CostModel {
 public:
  // Takes DefaultFactors of each query's device; 16-bit matmuls on a device
  // with fitted factors (ops/op_factors.h) take its rule in their place.
  RooflineCost() = default;
  // Takes `factors` for every device and operation.
  explicit RooflineCost(const RooflineFactors& factors)
      : factors_(factors), fixed_(true) {}

  LayerCost Cost(const Platform& platform,
                 const LayerQuery& query) const override;
  std::string Fingerprint() const override;

 private:
  RooflineFactors factors_;
  bool fixed_ = false;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_ROOFLINE_COST_H_
