// Layer costs corrected by measurements: a decorator on any cost model.

#ifndef SEMU_COST_CALIBRATION_CALIBRATED_COST_H_
#define SEMU_COST_CALIBRATION_CALIBRATED_COST_H_

#include <string>
#include <vector>

#include "absl/types/span.h"
#include "semu/cost/calibration/calibration.h"
#include "semu/cost/cost_model.h"

namespace pipeweaver::semu {

// Multiplies the base's times by the calibration's factors for the layer's
// kind; bytes and copies stay. A fused backward is corrected like the sum of
// its input and weight gradient. Immutable and thread-safe.
class CalibratedCost : public CostModel {
 public:
  // `base` must outlive the model.
  CalibratedCost(const CostModel& base, const Calibration& calibration)
      : base_(base), calibration_(calibration) {}

  LayerCost Cost(const Platform& platform,
                 const LayerQuery& query) const override;
  std::vector<LayerCost> CostAll(
      const Platform& platform,
      absl::Span<const LayerQuery> queries) const override;
  // The base's, and the factors: the same factors under another version are
  // the same costs.
  std::string Fingerprint() const override;

 private:
  void Correct(LayerKind kind, LayerCost* cost) const;

  const CostModel& base_;
  const Calibration calibration_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_CALIBRATION_CALIBRATED_COST_H_
