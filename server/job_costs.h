// What a server learns of one job's costs: measured layers, factors fitted to
// executed steps, peaks of memory, drift; published in discrete versions.

#ifndef SERVER_JOB_COSTS_H_
#define SERVER_JOB_COSTS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "search/planner.h"
#include "semu/base/mutex.h"
#include "semu/cost/calibration/calibration.h"
#include "semu/cost/calibration/corrected_costs.h"
#include "semu/cost/calibration/drift_alarm.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/measured/measured_cost.h"
#include "semu/model/job.h"

namespace pipeweaver::server {

// What plans are made with. Immutable once published.
struct CostVersion {
  // Counts up with each publication; 0: nothing was learnt yet.
  int64_t number = 0;
  std::shared_ptr<const semu::CorrectedCosts> costs;
  // Counts up when the measured layers below change.
  int64_t layers_number = 0;
  semu::Calibration calibration;
  // Measured layers that `costs` rest on.
  int64_t measured_layers = 0;
  // [rank], bytes per GPU by which a reported peak passed its prediction, in
  // whole steps; empty: by nothing.
  std::vector<int64_t> extra_reserve_bytes;

  search::PrepareOptions Prepare() const {
    search::PrepareOptions options;
    options.costs = costs;
    options.extra_reserve_bytes = extra_reserve_bytes;
    return options;
  }
};

// A version comes out when it would change plans, not at each report: each
// makes cached plans stale.
//   Measured layers: when they miss what the version before holds of them by
//     more than kPublishError in the mean, or lie outside what it has measured.
//     Factors start anew with the first ones, since they corrected other costs;
//     later they are kept until they are fitted to what is observed from then
//     on.
//   Factors: as semu::Calibrator says, fitted after each quarter of its window;
//     the machine's speed after each report.
//   Memory: when a rank's excess grows by a step of kReserveStepBytes.
// Thread-safe.
class JobCosts {
 public:
  static constexpr double kPublishError = 0.01;
  static constexpr int64_t kReserveStepBytes = int64_t{16} << 20;
  // Measured layers held; those not measured for the longest time go first.
  static constexpr int kMaxLayers = 4096;
  // Earlier measurements of a layer weigh as this many at most.
  static constexpr int64_t kMaxWeight = 64;
  static constexpr int kStepsHeld = 4;
  static constexpr int kLeastObservationsPerReport = 16;
  // Observations taken of one report, at most.
  static constexpr int kMostObservationsPerReport = 256;

  JobCosts(const semu::Job& job,
           std::shared_ptr<const semu::CostModel> analytic,
           const std::vector<semu::MeasuredLayer>& layers);

  // The latest version published.
  std::shared_ptr<const CostVersion> current() const;

  // Observations to take of one report: those of all ranks over kStepsHeld
  // steps are held, as far as each is to have kLeastObservationsPerReport.
  int observations_per_report() const;

  void AddLayers(const std::vector<semu::MeasuredLayer>& layers);
  // What ObserveCosts made of a rank's report of `step`, on top of the measured
  // layers of `basis`; left out when those are no longer the published ones.
  void AddObservations(const CostVersion& basis, int64_t step,
                       std::vector<semu::CostObservation> observations);
  // A rank's peak as predicted without the extra reserve, and as reported. The
  // same as the rank of that replica reported before says nothing new: it is no
  // peak of this step, but a high-water mark, or that of something that plans
  // do not change.
  // REQUIRES: rank is one of the job's.
  void AddPeak(uint32_t replica, int rank, int64_t predicted_bytes,
               int64_t reported_bytes);
  // No plan is possible with the reserve published: publishes it with that of
  // the rank that grew most over `accepted`, PlannableJob::extra_reserve_bytes
  // of a job with plans, taken back; null: none grew. Peaks of the rank
  // that ask for as much again do not count.
  std::shared_ptr<const CostVersion> RefuseReserve(
      const std::vector<int64_t>& accepted);
  // Forgets peaks: what ranks hold has changed.
  void BeginLayout();

  // A replica's step (both times > 0).
  struct DriftState {
    // If the alarm names it.
    std::optional<semu::Drift> drift;
    // The replica's step before was not named and this one is, or the other way
    // round.
    bool changed = false;
    // Replicas whose latest step was named.
    int drifting = 0;
  };
  DriftState ObserveStep(uint32_t replica, int64_t step, int64_t predicted_ns,
                         int64_t measured_ns);
  // Steps named since registration.
  int64_t drifted_steps() const;

  // Whether a job that holds the version `held` is to be priced anew: something
  // new is there, or a later version than it holds; and no other caller is at
  // it. True: the caller ends with EndPricing.
  bool TakeDue(const CostVersion& held);
  void EndPricing();
  // Fits and publishes. The current version where nothing has changed enough;
  // null where that is the one held.
  std::shared_ptr<const CostVersion> Publish(const CostVersion& held);

 private:
  struct Held {
    semu::MeasuredLayer layer;
    uint64_t added = 0;  // key into by_age_
  };

  void AddLayer(const semu::MeasuredLayer& layer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  std::vector<semu::MeasuredLayer> Layers() const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Measured layers say something else than those published.
  bool LayersMoved(const std::vector<semu::MeasuredLayer>& layers,
                   const semu::MeasuredCost& published) const;

  const semu::Platform platform_;
  const std::shared_ptr<const semu::CostModel> analytic_;

  // Held while layers are compared and factors fitted, tens of milliseconds;
  // taken before mutex_.
  Mutex fit_mutex_;
  std::optional<semu::Calibrator> calibrator_ ABSL_GUARDED_BY(fit_mutex_);
  int64_t observations_ ABSL_GUARDED_BY(fit_mutex_) = 0;
  int64_t unfitted_ ABSL_GUARDED_BY(fit_mutex_) = 0;

  mutable Mutex mutex_;
  std::shared_ptr<const CostVersion> current_ ABSL_GUARDED_BY(mutex_);
  bool pricing_ ABSL_GUARDED_BY(mutex_) = false;
  bool fit_due_ ABSL_GUARDED_BY(mutex_) = false;
  bool speed_due_ ABSL_GUARDED_BY(mutex_) = false;
  bool layers_added_ ABSL_GUARDED_BY(mutex_) = false;
  std::map<semu::MeasuredLayer, Held, semu::MeasuredBefore> layers_
      ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, semu::MeasuredLayer> by_age_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_age_ ABSL_GUARDED_BY(mutex_) = 0;
  std::vector<int64_t> extra_reserve_bytes_ ABSL_GUARDED_BY(mutex_);
  // [rank], the least that was refused; empty: nothing was.
  std::vector<int64_t> refused_reserve_bytes_ ABSL_GUARDED_BY(mutex_);
  // Reported last, by replica and rank.
  std::map<std::pair<uint32_t, int>, int64_t> peaks_ ABSL_GUARDED_BY(mutex_);
  struct Watch {
    semu::DriftAlarm alarm;
    bool drifting = false;
  };
  std::map<uint32_t, Watch> watches_ ABSL_GUARDED_BY(mutex_);
  int drifting_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t drifted_steps_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace pipeweaver::server

#endif  // SERVER_JOB_COSTS_H_
