// Tells steps whose measured time parts from the prediction.

#ifndef SEMU_COST_CALIBRATION_DRIFT_ALARM_H_
#define SEMU_COST_CALIBRATION_DRIFT_ALARM_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

namespace pipeweaver::semu {

struct DriftOptions {
  // Relative error below which no step is named.
  double tolerance = 0.03;
  // Beyond the tolerance, this many times the spread of ordinary steps.
  double spreads = 4;
  // Ordinary steps remembered for the spread.
  std::size_t window = 64;
};

struct Drift {
  int64_t step = 0;
  int64_t predicted_ns = 0;
  int64_t measured_ns = 0;
  // measured / predicted - 1.
  double relative_error = 0;
  // What it had to exceed.
  double limit = 0;
};

// Watches one replica's steps. A step is named when |ln(measured / predicted)|
// exceeds the larger of ln(1 + tolerance) and `spreads` times the spread of the
// ordinary steps before it (1.4826 times the median of their absolute log
// errors, which outliers hardly move). Named steps do not enter the spread, so
// that an alarm does not dull the next. Not thread-safe.
class DriftAlarm {
 public:
  explicit DriftAlarm(const DriftOptions& options = {}) : options_(options) {}

  // Takes a step (both times > 0); the drift if it is named.
  std::optional<Drift> Observe(int64_t step, int64_t predicted_ns,
                               int64_t measured_ns);

 private:
  const DriftOptions options_;
  std::deque<double> ordinary_log_errors_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_CALIBRATION_DRIFT_ALARM_H_
