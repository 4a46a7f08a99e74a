// Tells steps whose measured time parts from the prediction.

#include "semu/cost/calibration/drift_alarm.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "semu/base/check.h"

namespace pipeweaver::semu {
namespace {

// A spread of fewer steps says nothing.
constexpr std::size_t kMinSteps = 5;
// Standard deviations of a normal distribution in its median absolute
// deviation.
constexpr double kDeviationsPerMad = 1.4826;

double MedianAbsolute(const std::deque<double>& values) {
  std::vector<double> sorted;
  sorted.reserve(values.size());
  for (const double value : values) sorted.push_back(std::abs(value));
  const auto middle =
      sorted.begin() + static_cast<std::ptrdiff_t>(sorted.size() / 2);
  std::nth_element(sorted.begin(), middle, sorted.end());
  return *middle;
}

}  // namespace

std::optional<Drift> DriftAlarm::Observe(int64_t step, int64_t predicted_ns,
                                         int64_t measured_ns) {
  PW_CHECK(predicted_ns > 0 && measured_ns > 0);
  const double ratio =
      static_cast<double>(measured_ns) / static_cast<double>(predicted_ns);
  double log_limit = std::log1p(options_.tolerance);
  if (ordinary_log_errors_.size() >= kMinSteps) {
    log_limit = std::max(log_limit, options_.spreads * kDeviationsPerMad *
                                        MedianAbsolute(ordinary_log_errors_));
  }
  const double log_error = std::log(ratio);
  if (std::abs(log_error) > log_limit) {
    return Drift{step, predicted_ns, measured_ns, ratio - 1,
                 std::expm1(log_limit)};
  }
  ordinary_log_errors_.push_back(log_error);
  if (ordinary_log_errors_.size() > options_.window)
    ordinary_log_errors_.pop_front();
  return std::nullopt;
}

}  // namespace pipeweaver::semu
