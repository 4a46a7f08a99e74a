// What the core tells of its work: the wall towards metrics and logs.

#ifndef SERVER_PLANNER_OBSERVER_H_
#define SERVER_PLANNER_OBSERVER_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "server/job_costs.h"
#include "server/sealed_plan.h"

namespace pipeweaver::server {

// Called on any thread; must be thread-safe and quick, and not call back. A
// job's first two come in their order.
class PlannerObserver {
 public:
  virtual ~PlannerObserver() = default;

  virtual void OnJobRegistered(const std::string& job, uint64_t attempt) {
    (void)job, (void)attempt;
  }
  // `unused`: because it was not used for long; else because it was asked for.
  virtual void OnJobRemoved(const std::string& job, bool unused) {
    (void)job, (void)unused;
  }
  // A plan of a batch with the same metadata was looked for.
  virtual void OnLikeBatchLookup(bool found) { (void)found; }
  virtual void OnPlanSealed(const SealedPlan& sealed,
                            const PlanTimings& timings) {
    (void)sealed, (void)timings;
  }
  virtual void OnStepFailed(const StepKey& key, const absl::Status& status) {
    (void)key, (void)status;
  }
  // The step's sealed plan gave way to others, as their bytes were more than
  // may be held, before all ranks had read it.
  virtual void OnPlanGaveWay(const StepKey& key) { (void)key; }
  // A rank's measured over predicted step time.
  virtual void OnReport(const std::string& job,
                        double measured_over_predicted) {
    (void)job, (void)measured_over_predicted;
  }
  // A version of the job's costs is in use from the next step on: a new one, or
  // with an attempt the one that it begins with.
  virtual void OnCosts(const std::string& job, const CostVersion& version,
                       bool is_new) {
    (void)job, (void)version, (void)is_new;
  }
  // A version was not taken up: the job cannot be planned with it.
  virtual void OnCostsRefused(const std::string& job,
                              const absl::Status& status) {
    (void)job, (void)status;
  }
  // A step's measured time parted from the prediction, or did so no longer.
  virtual void OnDrift(const StepKey& key, const JobCosts::DriftState& state) {
    (void)key, (void)state;
  }
};

}  // namespace pipeweaver::server

#endif  // SERVER_PLANNER_OBSERVER_H_
