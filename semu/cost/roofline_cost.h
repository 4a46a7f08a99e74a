// Analytic costs: every operation of a layer takes the largest of what its
// arithmetic, its memory traffic and its network traffic need, plus a launch.

#ifndef SEMU_COST_ROOFLINE_COST_H_
#define SEMU_COST_ROOFLINE_COST_H_

#include <string>

#include "semu/cost/cost_model.h"
#include "semu/cost/roofline_factors.h"

namespace pipeweaver::semu {

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
