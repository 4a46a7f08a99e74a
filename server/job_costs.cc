// See job_costs.h.

#include "server/job_costs.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace pipeweaver::server {
namespace {

// Observations since the last fit after which the next is due: a quarter of
// those held, as many as say anything at all.
int64_t FitAfter(int64_t observations) {
  const semu::CalibratorOptions options;
  return std::clamp(observations / 4,
                    static_cast<int64_t>(options.min_observations),
                    static_cast<int64_t>(options.window) / 4);
}

}  // namespace

JobCosts::JobCosts(const semu::Job& job,
                   std::shared_ptr<const semu::CostModel> analytic,
                   const std::vector<semu::MeasuredLayer>& layers)
    : platform_(semu::PlatformOf(job)), analytic_(std::move(analytic)) {
  MutexLock fit_lock(&fit_mutex_);
  calibrator_.emplace();
  MutexLock lock(&mutex_);
  for (const semu::MeasuredLayer& layer : layers) AddLayer(layer);
  auto version = std::make_shared<CostVersion>();
  version->measured_layers = static_cast<int64_t>(layers_.size());
  version->costs = std::make_shared<semu::CorrectedCosts>(analytic_, Layers(),
                                                          version->calibration);
  current_ = std::move(version);
}

std::shared_ptr<const CostVersion> JobCosts::current() const {
  MutexLock lock(&mutex_);
  return current_;
}

int JobCosts::observations_per_report() const {
  const int64_t reports = int64_t{platform_.parallelism.pipeline_parallel} *
                          platform_.parallelism.data_parallel * kStepsHeld;
  const auto window = static_cast<int64_t>(semu::CalibratorOptions().window);
  return static_cast<int>(std::clamp<int64_t>(window / reports,
                                              kLeastObservationsPerReport,
                                              kMostObservationsPerReport));
}

void JobCosts::AddLayer(const semu::MeasuredLayer& layer) {
  if (layer.shape.tokens <= 0 || layer.ns <= 0 || layer.count <= 0) return;
  const auto [it, inserted] = layers_.try_emplace(layer);
  Held& held = it->second;
  if (inserted) {
    held.layer = layer;
  } else {
    // Old and new by their counts, the old ones fading.
    const auto old_weight =
        static_cast<double>(std::min(held.layer.count, kMaxWeight));
    const auto new_weight = static_cast<double>(layer.count);
    held.layer.ns =
        std::llround((old_weight * static_cast<double>(held.layer.ns) +
                      new_weight * static_cast<double>(layer.ns)) /
                     (old_weight + new_weight));
    held.layer.count = std::min(held.layer.count, kMaxWeight) + layer.count;
    by_age_.erase(held.added);
  }
  held.added = next_age_++;
  by_age_[held.added] = layer;
  if (static_cast<int>(layers_.size()) > kMaxLayers) {
    layers_.erase(by_age_.begin()->second);
    by_age_.erase(by_age_.begin());
  }
}

void JobCosts::AddLayers(const std::vector<semu::MeasuredLayer>& layers) {
  MutexLock lock(&mutex_);
  for (const semu::MeasuredLayer& layer : layers) AddLayer(layer);
  layers_added_ |= !layers.empty();
}

std::vector<semu::MeasuredLayer> JobCosts::Layers() const {
  std::vector<semu::MeasuredLayer> layers;
  layers.reserve(layers_.size());
  for (const auto& [key, held] : layers_) layers.push_back(held.layer);
  return layers;
}

bool JobCosts::LayersMoved(const std::vector<semu::MeasuredLayer>& layers,
                           const semu::MeasuredCost& published) const {
  double error = 0;
  for (const semu::MeasuredLayer& layer : layers) {
    const std::optional<int64_t> predicted_ns =
        published.PredictNs(platform_, layer);
    if (!predicted_ns) return true;
    if (*predicted_ns == 0) continue;  // a pass that the layer has not
    error += std::abs(
        static_cast<double>(*predicted_ns) / static_cast<double>(layer.ns) - 1);
  }
  return error > kPublishError * static_cast<double>(layers.size());
}

void JobCosts::AddObservations(
    const CostVersion& basis, int64_t step,
    std::vector<semu::CostObservation> observations) {
  MutexLock fit_lock(&fit_mutex_);
  MutexLock lock(&mutex_);
  if (basis.layers_number != current_->layers_number) return;
  for (semu::CostObservation& observation : observations) {
    observation.step = step;
    calibrator_->Add(observation);
  }
  observations_ += static_cast<int64_t>(observations.size());
  unfitted_ += static_cast<int64_t>(observations.size());
  fit_due_ = unfitted_ >= FitAfter(observations_);
  speed_due_ = current_->calibration.version > 0;
}

void JobCosts::AddPeak(uint32_t replica, int rank, int64_t predicted_bytes,
                       int64_t reported_bytes) {
  MutexLock lock(&mutex_);
  if (std::exchange(peaks_[{replica, rank}], reported_bytes) ==
      reported_bytes) {
    return;
  }
  const int64_t excess_bytes =
      semu::CorrectedReserveBytes(0, {{predicted_bytes, reported_bytes}});
  if (excess_bytes == 0) return;
  const int64_t steps =
      (excess_bytes + kReserveStepBytes - 1) / kReserveStepBytes;
  if (!refused_reserve_bytes_.empty() &&
      refused_reserve_bytes_[rank] <= steps * kReserveStepBytes) {
    return;
  }
  extra_reserve_bytes_.resize(platform_.parallelism.pipeline_parallel, 0);
  extra_reserve_bytes_[rank] =
      std::max(extra_reserve_bytes_[rank], steps * kReserveStepBytes);
}

std::shared_ptr<const CostVersion> JobCosts::RefuseReserve(
    const std::vector<int64_t>& accepted) {
  MutexLock fit_lock(&fit_mutex_);
  MutexLock lock(&mutex_);
  CostVersion next = *current_;
  std::vector<int64_t>& extra = next.extra_reserve_bytes;
  const auto grown = [&](size_t rank) {
    return extra[rank] - (accepted.empty() ? 0 : accepted[rank]);
  };
  size_t most = 0;
  for (size_t rank = 1; rank < extra.size(); ++rank) {
    if (grown(rank) > grown(most)) most = rank;
  }
  if (extra.empty() || grown(most) <= 0) return nullptr;
  refused_reserve_bytes_.resize(extra.size(),
                                std::numeric_limits<int64_t>::max());
  refused_reserve_bytes_[most] =
      std::min(refused_reserve_bytes_[most], extra[most]);
  extra[most] -= grown(most);
  extra_reserve_bytes_[most] = extra[most];
  ++next.number;
  current_ = std::make_shared<const CostVersion>(std::move(next));
  return current_;
}

void JobCosts::BeginLayout() {
  MutexLock lock(&mutex_);
  extra_reserve_bytes_.clear();
  peaks_.clear();
  refused_reserve_bytes_.clear();
  if (current_->extra_reserve_bytes.empty()) return;
  CostVersion same = *current_;
  same.extra_reserve_bytes.clear();
  current_ = std::make_shared<const CostVersion>(std::move(same));
}

JobCosts::DriftState JobCosts::ObserveStep(uint32_t replica, int64_t step,
                                           int64_t predicted_ns,
                                           int64_t measured_ns) {
  MutexLock lock(&mutex_);
  Watch& watch = watches_[replica];
  DriftState state;
  state.drift = watch.alarm.Observe(step, predicted_ns, measured_ns);
  state.changed = watch.drifting != state.drift.has_value();
  watch.drifting = state.drift.has_value();
  if (state.changed) drifting_ += watch.drifting ? 1 : -1;
  if (watch.drifting) ++drifted_steps_;
  state.drifting = drifting_;
  return state;
}

int64_t JobCosts::drifted_steps() const {
  MutexLock lock(&mutex_);
  return drifted_steps_;
}

bool JobCosts::TakeDue(const CostVersion& held) {
  MutexLock lock(&mutex_);
  const bool memory_moved =
      extra_reserve_bytes_ != current_->extra_reserve_bytes;
  if (pricing_ || !(fit_due_ || speed_due_ || layers_added_ || memory_moved ||
                    held.number < current_->number)) {
    return false;
  }
  pricing_ = true;
  return true;
}

void JobCosts::EndPricing() {
  MutexLock lock(&mutex_);
  pricing_ = false;
}

std::shared_ptr<const CostVersion> JobCosts::Publish(const CostVersion& held) {
  MutexLock fit_lock(&fit_mutex_);
  CostVersion next;
  std::vector<semu::MeasuredLayer> layers;
  bool fit = false;
  {
    MutexLock lock(&mutex_);
    next = *current_;
    if (layers_added_) layers = Layers();
    layers_added_ = false;
    fit = fit_due_;
    fit_due_ = speed_due_ = false;
  }
  const bool layers_moved =
      !layers.empty() && LayersMoved(layers, next.costs->measured());
  bool changed = layers_moved;
  if (layers_moved) {
    if (next.measured_layers > 0) {
      calibrator_->ForgetObservations();
    } else {
      calibrator_.emplace();
      next.calibration = {};
    }
    observations_ = 0;
    unfitted_ = 0;
    next.measured_layers = static_cast<int64_t>(layers.size());
    ++next.layers_number;
  } else {
    if (fit) unfitted_ = 0;
    if (const auto calibration =
            fit ? calibrator_->Publish() : calibrator_->PublishSpeed()) {
      next.calibration = *calibration;
      changed = true;
    }
  }
  if (changed) {
    next.costs = std::make_shared<semu::CorrectedCosts>(
        analytic_, layers_moved ? layers : next.costs->measured().points(),
        next.calibration);
  }
  MutexLock lock(&mutex_);
  const bool memory_moved =
      extra_reserve_bytes_ != current_->extra_reserve_bytes;
  next.extra_reserve_bytes = extra_reserve_bytes_;
  if (!changed && !memory_moved) {
    return held.number < current_->number ? current_ : nullptr;
  }
  ++next.number;
  current_ = std::make_shared<const CostVersion>(std::move(next));
  return current_;
}

}  // namespace pipeweaver::server
