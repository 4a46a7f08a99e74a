// The costs a job is planned with: analytic, replaced by measured layers where
// there are any, corrected by calibration.

#ifndef SEMU_COST_CALIBRATION_CORRECTED_COSTS_H_
#define SEMU_COST_CALIBRATION_CORRECTED_COSTS_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "semu/cost/calibration/calibrated_cost.h"
#include "semu/cost/calibration/calibration.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/measured/measured_cost.h"

namespace pipeweaver::semu {

// One cost model of three; owns what stands below it. Immutable and
// thread-safe.
class CorrectedCosts : public CostModel {
 public:
  CorrectedCosts(std::shared_ptr<const CostModel> analytic,
                 std::vector<MeasuredLayer> points,
                 const Calibration& calibration)
      : analytic_(std::move(analytic)),
        measured_(*analytic_, std::move(points)),
        calibrated_(measured_, calibration) {}

  LayerCost Cost(const Platform& platform,
                 const LayerQuery& query) const override {
    return calibrated_.Cost(platform, query);
  }
  std::vector<LayerCost> CostAll(
      const Platform& platform,
      absl::Span<const LayerQuery> queries) const override {
    return calibrated_.CostAll(platform, queries);
  }
  std::string Fingerprint() const override { return calibrated_.Fingerprint(); }

  // Without the calibration: what its factors are fitted on top of.
  const MeasuredCost& measured() const { return measured_; }

 private:
  const std::shared_ptr<const CostModel> analytic_;
  const MeasuredCost measured_;
  const CalibratedCost calibrated_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_CALIBRATION_CORRECTED_COSTS_H_
