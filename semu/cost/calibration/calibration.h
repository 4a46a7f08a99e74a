// Correction factors for layer costs, fitted to measured times.

#ifndef SEMU_COST_CALIBRATION_CALIBRATION_H_
#define SEMU_COST_CALIBRATION_CALIBRATION_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "semu/model/job.h"

namespace pipeweaver::semu {

enum class CostPass { kForward, kInputGrad, kWeightGrad };
inline constexpr int kNumCostPasses = 3;
inline constexpr int kNumLayerKinds = 6;
inline constexpr int kNumCostParts = kNumLayerKinds * kNumCostPasses;

// Number of a layer kind's pass, 0 .. kNumCostParts - 1.
constexpr int CostPart(LayerKind kind, CostPass pass) {
  return static_cast<int>(kind) * kNumCostPasses + static_cast<int>(pass);
}

// A version of the factors. Immutable once published.
struct Calibration {
  // 0: nothing corrected.
  int64_t version = 0;
  // What predicted times are multiplied by, by CostPart.
  std::array<double, kNumCostParts> factors = Uncorrected();
  // Mean of |predicted / measured - 1| over the latest steps observed, without
  // and with the factors.
  double error_before = 0;
  double error_after = 0;
  // Those fitted.
  int64_t observations = 0;

  static constexpr std::array<double, kNumCostParts> Uncorrected() {
    std::array<double, kNumCostParts> ones = {};
    for (double& one : ones) one = 1;
    return ones;
  }
};

// A measured time and what made it up: a profiled layer has one part, a stage
// of a reported step those of its layers.
struct CostObservation {
  // Uncorrected predictions in ns, by CostPart.
  std::array<int64_t, kNumCostParts> predicted_ns = {};
  int64_t measured_ns = 0;
  // The training step that it was measured in.
  int64_t step = 0;
};

struct CalibratorOptions {
  // The latest that are fitted; memory is bounded by it.
  std::size_t window = 2048;
  // Fewer say nothing.
  std::size_t min_observations = 8;
  // A new version is published only if it moves the times of the latest steps
  // by more than this share in the mean: each makes stored costs and plans
  // stale, and factors that little depends on move by chance.
  double publish_change = 0.01;
  // Factors stay within 1 / bound .. bound.
  double bound = 10;
  // What tells how fast the machine is now: the observations of so many steps,
  // the latest, and at least so many observations.
  int speed_steps = 2;
  std::size_t min_speed_observations = 32;
};

// Fits factors to observations, outliers held down: the sum over observations
// of the soft-L1 loss of ln(sum factor * predicted / measured), with a slight
// pull of every factor to 1. What the window holds nothing of keeps its last
// factor.
// On top of the fit, all factors of what was seen follow the machine's speed,
// which changes from step to step (clocks, heat, neighbours): they are
// multiplied by the median of measured / predicted in the fastest of the latest
// steps, where that is more than chance.
// Deterministic in the order of Add. Not thread-safe.
class Calibrator {
 public:
  explicit Calibrator(const CalibratorOptions& options = {})
      : options_(options) {}

  // Takes an observation; one without a prediction or measurement > 0 is left
  // out.
  void Add(const CostObservation& observation);

  // Fits, and follows the speed; a new version if it differs enough from the
  // last one published. O(window).
  std::optional<Calibration> Publish();

  // As Publish, on top of the last fit; nothing before there is one, nor while
  // fewer steps and observations are there than tell the speed. A thousandth of
  // the time of a fit.
  std::optional<Calibration> PublishSpeed();

  // The costs that predictions come from have changed a little: what was
  // observed says nothing of them, the factors go on until what comes is
  // fitted.
  void ForgetObservations() { observations_.clear(); }

  // The last version published.
  const Calibration& current() const { return current_; }

 private:
  bool KnowsSpeed() const;
  std::vector<CostObservation> Latest() const;
  std::optional<Calibration> PublishFitted();

  const CalibratorOptions options_;
  std::deque<CostObservation> observations_;
  // By CostPart, of the last fit that saw it. Others: 1.
  std::map<int, double> fitted_;
  Calibration current_;
};

// A memory reserve corrected by what GPUs reported: `reserve_bytes` plus the
// largest amount by which a reported peak passed its prediction, never less
// than `reserve_bytes`. Pairs of predicted and reported peak, bytes >= 0.
int64_t CorrectedReserveBytes(
    int64_t reserve_bytes,
    const std::vector<std::pair<int64_t, int64_t>>& predicted_and_reported);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_CALIBRATION_CALIBRATION_H_
