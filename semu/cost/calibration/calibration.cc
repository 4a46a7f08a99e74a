// Correction factors for layer costs, fitted to measured times.

#include "semu/cost/calibration/calibration.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <utility>
#include <vector>

#include "semu/cost/ops/least_squares.h"

namespace pipeweaver::semu {
namespace {

// Of a factor's logarithm, against one observation's weight of 1.
constexpr double kPullToOne = 0.01;
// Standard errors by which the speed must part from that of the fit.
constexpr double kSpeedErrors = 2;
// Of normally distributed values: standard deviation over the median of
// absolute deviations, and a median's standard error times the root of their
// number over the standard deviation.
constexpr double kDeviationOfMedian = 1.4826;
constexpr double kErrorOfMedian = 1.2533;

// The upper median. REQUIRES: not empty.
double Median(std::vector<double> values) {
  const auto middle =
      values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

double Corrected(const CostObservation& observation,
                 const std::array<double, kNumCostParts>& factors) {
  double sum = 0;
  for (int part = 0; part < kNumCostParts; ++part) {
    sum += factors[part] * static_cast<double>(observation.predicted_ns[part]);
  }
  return sum;
}

double MeanError(const std::vector<CostObservation>& observations,
                 const std::array<double, kNumCostParts>& factors) {
  double sum = 0;
  for (const CostObservation& observation : observations) {
    sum += std::abs(Corrected(observation, factors) /
                        static_cast<double>(observation.measured_ns) -
                    1);
  }
  return sum / static_cast<double>(observations.size());
}

// What measured times of the fastest step are of those corrected by `factors`:
// one slow step among fast ones is not a slower machine. 1 where they do not
// part from them by more than chance. REQUIRES: not empty.
double Speed(const std::vector<CostObservation>& observations,
             const std::array<double, kNumCostParts>& factors) {
  std::map<int64_t, std::vector<double>> logs_of_step;
  for (const CostObservation& observation : observations) {
    logs_of_step[observation.step].push_back(
        std::log(static_cast<double>(observation.measured_ns) /
                 Corrected(observation, factors)));
  }
  double fastest = std::numeric_limits<double>::infinity();
  std::vector<double> deviations;
  for (const auto& [step, logs] : logs_of_step) {
    const double middle = Median(logs);
    fastest = std::min(fastest, middle);
    for (const double log : logs) deviations.push_back(std::abs(log - middle));
  }
  const double steps = static_cast<double>(logs_of_step.size());
  const double error =
      kErrorOfMedian * kDeviationOfMedian * Median(std::move(deviations)) /
      std::sqrt(static_cast<double>(observations.size()) / steps);
  return std::abs(fastest) > kSpeedErrors * error ? std::exp(fastest) : 1;
}

}  // namespace

void Calibrator::Add(const CostObservation& observation) {
  const bool predicted = std::all_of(observation.predicted_ns.begin(),
                                     observation.predicted_ns.end(),
                                     [](int64_t ns) { return ns >= 0; }) &&
                         std::any_of(observation.predicted_ns.begin(),
                                     observation.predicted_ns.end(),
                                     [](int64_t ns) { return ns > 0; });
  if (!predicted || observation.measured_ns <= 0) return;
  observations_.push_back(observation);
  if (observations_.size() > options_.window) observations_.pop_front();
}

std::optional<Calibration> Calibrator::Publish() {
  if (observations_.size() < options_.min_observations) return std::nullopt;
  // Only what was seen is fitted.
  std::vector<int> parts;
  for (int part = 0; part < kNumCostParts; ++part) {
    if (std::any_of(observations_.begin(), observations_.end(),
                    [part](const CostObservation& observation) {
                      return observation.predicted_ns[part] > 0;
                    })) {
      parts.push_back(part);
    }
  }
  const double log_bound = std::log(options_.bound);
  const auto factors_of = [&parts](const std::vector<double>& logs) {
    std::array<double, kNumCostParts> factors = Calibration::Uncorrected();
    for (std::size_t i = 0; i < parts.size(); ++i) {
      factors[parts[i]] = std::exp(logs[i]);
    }
    return factors;
  };
  // From the median ratio, near which a robust fit does not get lost.
  std::vector<double> ratios;
  for (const CostObservation& observation : observations_) {
    ratios.push_back(
        std::log(static_cast<double>(observation.measured_ns) /
                 Corrected(observation, Calibration::Uncorrected())));
  }
  const double start =
      std::clamp(Median(std::move(ratios)), -log_bound, log_bound);
  const LeastSquaresResult result = MinimizeSquares(
      std::vector<Parameter>(parts.size(), {start, -log_bound, log_bound}),
      [&](const std::vector<double>& logs, std::vector<double>& residuals) {
        const std::array<double, kNumCostParts> factors = factors_of(logs);
        residuals.clear();
        for (const CostObservation& observation : observations_) {
          residuals.push_back(
              std::log(Corrected(observation, factors) /
                       static_cast<double>(observation.measured_ns)));
        }
        for (const double log : logs) residuals.push_back(kPullToOne * log);
      },
      {.outlier_scale = 0.05});
  for (std::size_t i = 0; i < parts.size(); ++i) {
    fitted_[parts[i]] = std::exp(result.values[i]);
  }
  return PublishFitted();
}

std::optional<Calibration> Calibrator::PublishSpeed() {
  if (fitted_.empty() || !KnowsSpeed()) return std::nullopt;
  return PublishFitted();
}

// Whether there are as many observations as Latest() looks for, as one step may
// be slow by chance; or as many as there can be.
bool Calibrator::KnowsSpeed() const {
  if (observations_.size() >= options_.window) return true;
  if (observations_.size() < options_.min_speed_observations) return false;
  std::vector<int64_t> steps;
  for (auto it = observations_.rbegin();
       it != observations_.rend() &&
       static_cast<int>(steps.size()) < options_.speed_steps;
       ++it) {
    if (std::find(steps.begin(), steps.end(), it->step) == steps.end()) {
      steps.push_back(it->step);
    }
  }
  return static_cast<int>(steps.size()) >= options_.speed_steps;
}

// The observations that tell the speed.
std::vector<CostObservation> Calibrator::Latest() const {
  std::vector<CostObservation> latest;
  std::vector<int64_t> steps;
  for (auto it = observations_.rbegin(); it != observations_.rend(); ++it) {
    if (std::find(steps.begin(), steps.end(), it->step) == steps.end()) {
      if (static_cast<int>(steps.size()) >= options_.speed_steps &&
          latest.size() >= options_.min_speed_observations) {
        break;
      }
      steps.push_back(it->step);
    }
    latest.push_back(*it);
  }
  return latest;
}

std::optional<Calibration> Calibrator::PublishFitted() {
  Calibration next;
  for (const auto& [part, factor] : fitted_) next.factors[part] = factor;
  const std::vector<CostObservation> latest = Latest();
  const double speed = Speed(latest, next.factors);
  for (const auto& [part, factor] : fitted_) {
    next.factors[part] =
        std::clamp(factor * speed, 1 / options_.bound, options_.bound);
  }
  double moved = 0;
  for (const CostObservation& observation : latest) {
    moved += std::abs(Corrected(observation, next.factors) /
                          Corrected(observation, current_.factors) -
                      1);
  }
  if (moved <= options_.publish_change * static_cast<double>(latest.size())) {
    return std::nullopt;
  }
  next.version = current_.version + 1;
  next.error_before = MeanError(latest, Calibration::Uncorrected());
  next.error_after = MeanError(latest, next.factors);
  next.observations = static_cast<int64_t>(observations_.size());
  current_ = next;
  return next;
}

int64_t CorrectedReserveBytes(
    int64_t reserve_bytes,
    const std::vector<std::pair<int64_t, int64_t>>& predicted_and_reported) {
  int64_t excess_bytes = 0;
  for (const auto& [predicted, reported] : predicted_and_reported) {
    excess_bytes = std::max(excess_bytes, reported - predicted);
  }
  return reserve_bytes + excess_bytes;
}

}  // namespace pipeweaver::semu
