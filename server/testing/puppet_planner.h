// A planner that finishes when a test tells it to.

#ifndef SERVER_TESTING_PUPPET_PLANNER_H_
#define SERVER_TESTING_PUPPET_PLANNER_H_

#include <cstdint>
#include <deque>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "search/planner.h"
#include "semu/base/mutex.h"

namespace pipeweaver::server {

// Plans are tiny and carry their label: the token count of the batch's first
// item, as the schedule's makespan. Thread-safe.
class PuppetPlanner final : public search::StepPlanner {
 public:
  // What the planner was asked.
  struct Call {
    int64_t label = 0;
    search::PlanOptions options;
    bool warm = false;
  };

  // Each Plan waits for Finish or Fail; otherwise it returns at once.
  void HoldPlans() {
    MutexLock lock(&mutex_);
    hold_ = true;
  }
  // Waits until `count` calls of Plan were made since the start.
  void WaitForPlans(int count);
  // Lets the held call with this label return a plan; `finished` as in
  // StepReport.
  void Finish(int64_t label, bool finished = true);
  void Fail(int64_t label, absl::Status status);
  // Calls of Plan since the start, in order.
  std::vector<Call> calls() const;
  // The next `count` calls of Prepare end when they are cancelled, or go on
  // when they are released.
  void HoldPrepares(int count = std::numeric_limits<int>::max()) {
    MutexLock lock(&mutex_);
    hold_prepares_ = count;
  }
  // Releases the call that is held longest.
  void ReleasePrepare() {
    MutexLock lock(&mutex_);
    ++prepares_released_;
  }
  // Waits until so many were held.
  void WaitForPrepares(int count);
  // Later calls answer this status.
  void FailPrepare(absl::Status status);
  // Later calls of Prepare fail where any extra reserve is asked for.
  void FailReserves() {
    MutexLock lock(&mutex_);
    fail_reserves_ = true;
  }
  void FailSafe(absl::Status status);
  // What lowering took in the reports of later plans.
  void set_lower_ns(int64_t ns) {
    MutexLock lock(&mutex_);
    lower_ns_ = ns;
  }
  int safe_calls() const {
    MutexLock lock(&mutex_);
    return safe_calls_;
  }

  absl::StatusOr<std::shared_ptr<const search::PlannableJob>> Prepare(
      const semu::Job& job, const std::optional<semu::Layout>& pinned,
      const search::PrepareOptions& options) const override;
  // Layers take a nanosecond a token forward, two backward.
  std::shared_ptr<const semu::CostModel> Costs() const override;
  absl::StatusOr<search::StepPlan> Plan(
      const search::PlannableJob& job, const semu::Batch& batch,
      const search::PlanOptions& options) const override;
  absl::StatusOr<search::StepPlan> PlanSafe(
      const search::PlannableJob& job, const semu::Batch& batch) const override;
  std::vector<std::string> StrategyNames() const override {
    return {"1f1b", "megatron"};
  }

 private:
  struct Release {
    int64_t label = 0;
    bool finished = true;
    absl::Status status;
  };

  search::StepPlan MakePlan(const search::PlannableJob& job, int64_t label,
                            const std::string& strategy) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  mutable Mutex mutex_;
  mutable CondVar changed_;
  bool hold_ ABSL_GUARDED_BY(mutex_) = false;
  mutable int hold_prepares_ ABSL_GUARDED_BY(mutex_) = 0;
  int prepares_released_ ABSL_GUARDED_BY(mutex_) = 0;
  mutable int prepares_held_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t lower_ns_ ABSL_GUARDED_BY(mutex_) = 0;
  mutable std::vector<Call> calls_ ABSL_GUARDED_BY(mutex_);
  mutable std::deque<Release> releases_ ABSL_GUARDED_BY(mutex_);
  mutable int safe_calls_ ABSL_GUARDED_BY(mutex_) = 0;
  bool fail_reserves_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status prepare_status_ ABSL_GUARDED_BY(mutex_);
  absl::Status safe_status_ ABSL_GUARDED_BY(mutex_);
};

// A batch with one microbatch and one item of `label` tokens.
semu::Batch LabelledBatch(int64_t label);

}  // namespace pipeweaver::server

#endif  // SERVER_TESTING_PUPPET_PLANNER_H_
