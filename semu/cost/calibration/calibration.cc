// Correction factors for layer costs, fitted to measured times.

#include "semu/cost/calibration/calibration.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "semu/cost/ops/least_squares.h"

namespace pipeweaver::semu {
namespace {

// Of a factor's logarithm, against one observation's weight of 1.
constexpr double kPullToOne = 0.01;

double Corrected(const CostObservation& observation,
                 const std::array<double, kNumCostParts>& factors) {
  double sum = 0;
  for (int part = 0; part < kNumCostParts; ++part) {
    sum += factors[part] * static_cast<double>(observation.predicted_ns[part]);
  }
  return sum;
}

double MeanError(const std::deque<CostObservation>& observations,
                 const std::array<double, kNumCostParts>& factors) {
  double sum = 0;
  for (const CostObservation& observation : observations) {
    sum += std::abs(Corrected(observation, factors) /
                        static_cast<double>(observation.measured_ns) -
                    1);
  }
  return sum / static_cast<double>(observations.size());
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
  const auto middle =
      ratios.begin() + static_cast<std::ptrdiff_t>(ratios.size() / 2);
  std::nth_element(ratios.begin(), middle, ratios.end());
  const double start = std::clamp(*middle, -log_bound, log_bound);
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

  Calibration next;
  next.factors = factors_of(result.values);
  bool changed = false;
  for (int part = 0; part < kNumCostParts; ++part) {
    changed |= std::abs(next.factors[part] / current_.factors[part] - 1) >
               options_.publish_change;
  }
  if (!changed) return std::nullopt;
  next.version = current_.version + 1;
  next.error_before = MeanError(observations_, Calibration::Uncorrected());
  next.error_after = MeanError(observations_, next.factors);
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
