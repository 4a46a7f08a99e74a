// A cost model at the end of what costs may be.

#ifndef SEARCH_TESTING_SLOWEST_COST_H_
#define SEARCH_TESTING_SLOWEST_COST_H_

#include <string>

#include "semu/cost/cost_model.h"

namespace pipeweaver::search::testing {

// Every layer takes as long as a cost can say, in its forward, or in its
// forward and backward.
class SlowestCost final : public semu::CostModel {
 public:
  explicit SlowestCost(bool backward = true) : backward_(backward) {}

  semu::LayerCost Cost(const semu::Platform&,
                       const semu::LayerQuery&) const override {
    semu::LayerCost cost;
    for (semu::StrategyCost& strategy : cost.strategies) {
      strategy.forward_ns = semu::kMaxCost;
      if (!backward_) continue;
      strategy.input_grad_ns = semu::kMaxCost;
      strategy.weight_grad_ns = semu::kMaxCost;
    }
    return cost;
  }
  std::string Fingerprint() const override { return "slowest"; }

 private:
  const bool backward_;
};

}  // namespace pipeweaver::search::testing

#endif  // SEARCH_TESTING_SLOWEST_COST_H_
