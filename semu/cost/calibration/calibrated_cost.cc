// Layer costs corrected by measurements.

#include "semu/cost/calibration/calibrated_cost.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace pipeweaver::semu {
namespace {

// REQUIRES: neither is negative. Rounds as std::llround does, and is cheaper.
int64_t Scaled(int64_t ns, double factor) {
  const double scaled =
      std::min<double>(static_cast<double>(ns) * factor, kMaxCost);
  const auto whole = static_cast<int64_t>(scaled);
  return whole + (scaled - static_cast<double>(whole) >= 0.5 ? 1 : 0);
}

}  // namespace

LayerCost CalibratedCost::Cost(const Platform& platform,
                               const LayerQuery& query) const {
  LayerCost cost = base_.Cost(platform, query);
  Correct(query.layer.kind, &cost);
  return cost;
}

std::vector<LayerCost> CalibratedCost::CostAll(
    const Platform& platform, absl::Span<const LayerQuery> queries) const {
  std::vector<LayerCost> costs = base_.CostAll(platform, queries);
  for (size_t i = 0; i < queries.size(); ++i) {
    Correct(queries[i].layer.kind, &costs[i]);
  }
  return costs;
}

void CalibratedCost::Correct(LayerKind kind, LayerCost* cost) const {
  const auto factor = [&](CostPass pass) {
    return calibration_.factors[CostPart(kind, pass)];
  };
  for (StrategyCost& strategy : cost->strategies) {
    const int64_t backward_ns =
        strategy.input_grad_ns + strategy.weight_grad_ns;
    strategy.forward_ns =
        Scaled(strategy.forward_ns, factor(CostPass::kForward));
    strategy.input_grad_ns =
        Scaled(strategy.input_grad_ns, factor(CostPass::kInputGrad));
    strategy.weight_grad_ns =
        Scaled(strategy.weight_grad_ns, factor(CostPass::kWeightGrad));
    if (strategy.fused_backward_ns && backward_ns > 0) {
      const double ratio = static_cast<double>(strategy.input_grad_ns +
                                               strategy.weight_grad_ns) /
                           static_cast<double>(backward_ns);
      strategy.fused_backward_ns = Scaled(*strategy.fused_backward_ns, ratio);
    }
  }
}

std::string CalibratedCost::Fingerprint() const {
  std::string fingerprint = absl::StrCat(base_.Fingerprint(), " calibrated");
  for (const double factor : calibration_.factors) {
    absl::StrAppend(&fingerprint, absl::StrFormat(" %.17g", factor));
  }
  return fingerprint;
}

}  // namespace pipeweaver::semu
