// The planner: from a job and a step's batch to checked programs. The one place
// that sees all of partition, search, check and lowering.

#ifndef SEARCH_PLANNER_H_
#define SEARCH_PLANNER_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "search/lower/program.h"
#include "search/partition/step_problem.h"
#include "search/plan/bubble_causes.h"
#include "search/problem/schedule.h"
#include "search/strategy/strategy.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// A job made ready for planning: layout decided, memory accounted, safe program
// proven to fit. Immutable.
struct PlannableJob {
  semu::Job job;
  semu::Layout layout;
  // What costs layers; the plans' profile digest is the SHA-256 of its
  // Fingerprint().
  std::shared_ptr<const semu::CostModel> costs;
  // [rank], bytes per GPU; see search/partition/memory_plan.h.
  std::vector<int64_t> static_bytes;
  std::vector<int64_t> activation_limit_bytes;
  // For the buffers of transfers beside the activations; on every rank.
  int64_t transfer_bytes = 0;
  // For the layer that runs; MemoryPlan::layer_reserve_bytes.
  std::vector<int64_t> layer_reserve_bytes;
  // Of static_bytes, those of PrepareOptions::extra_reserve_bytes.
  std::vector<int64_t> extra_reserve_bytes;
};

// What a job is prepared with beside what it says itself.
struct PrepareOptions {
  // Cost its layers; null: the planner's own.
  std::shared_ptr<const semu::CostModel> costs;
  // [rank], bytes per GPU, set aside on top of what the memory plan does;
  // empty: none.
  std::vector<int64_t> extra_reserve_bytes;
  // Such batches as the job will have, for whose first kSampleMicrobatches a
  // layout is proposed; empty: for batches made up from the job's limits. Not
  // owned.
  absl::Span<const semu::Batch> samples;
  // Of the search for a layout; without influence on it.
  int threads = 1;
  // Asked now and then by the search for a layout, on several threads at once;
  // true ends it with CANCELLED. Null: never.
  std::function<bool()> cancelled;
};

// Figures of a plan; see PlanReport in plan.proto.
struct StepReport {
  std::string strategy;
  int64_t evaluations = 0;
  int64_t makespan_ns = 0;           // transfers contending
  int64_t schedule_makespan_ns = 0;  // of the scheduling problem
  int64_t lower_bound_ns = 0;
  int64_t flow_lower_bound_ns = 0;
  int64_t layout_free_bound_ns = 0;
  double bubble_ratio = 0;
  BubbleCauses bubbles;
  std::vector<int64_t> peak_memory_bytes;  // [rank], static bytes included
  double measured_share = 0;
  // Mean makespan of the runs of JitterOptions; 0: not asked for.
  int64_t expected_makespan_ns = 0;
  bool finished = false;  // the search ended by itself, not by the deadline
  // Wall-clock.
  int64_t search_ns = 0;
  int64_t check_ns = 0;
  int64_t lower_ns = 0;

  // The schedule's makespan over its lower bound, less 1; 0 without a bound.
  double Gap() const {
    return lower_bound_ns <= 0 ? 0
                               : static_cast<double>(schedule_makespan_ns) /
                                         static_cast<double>(lower_bound_ns) -
                                     1;
  }
};

// A planned step. Both checkers have passed on it.
struct StepPlan {
  StepProblem step;
  Schedule schedule;
  StageTimes times;
  StepPrograms programs;
  StepReport report;
  // SearchResult::settings, for the next step's search to start from.
  std::vector<int32_t> settings;
};

// Durations that vary from run to run.
struct JitterOptions {
  // Standard deviation of a factor on every duration, 0 .. 1; 0: plans are
  // judged by their predicted makespan.
  double duration_noise = 0;
  // Runs that the expected makespan is the mean of, and the seed of the first;
  // each costs one emulation of the step.
  int runs = 16;
  uint64_t seed = 1;
};

struct PlanOptions {
  // Name of a strategy (StepPlanner::StrategyNames); empty: the default
  // portfolio.
  std::string strategy;
  // Its pool does the work before and behind the search, too.
  SearchOptions search;
  // The batch for whose mean baselines divide layers; null: the one to be
  // planned, which favours them. Not owned.
  const semu::Batch* reference = nullptr;
  // With noise, the search's budget is divided among plans that leave more and
  // more room between dependent stages, and the one of least expected makespan
  // is taken. Not for baselines.
  JitterOptions jitter;
};

// What the server needs of a planner; tests put a puppet in its place.
class StepPlanner {
 public:
  virtual ~StepPlanner() = default;

  // Validates nothing that job_proto.h has validated; proposes a layout where
  // `pinned` is absent. Errors: INVALID_ARGUMENT for a pinned layout that
  // breaks a rule, or times and sizes out of proportion; RESOURCE_EXHAUSTED
  // when weights, the safe program or a sample do not fit, naming rank, bytes
  // and limit; CANCELLED.
  virtual absl::StatusOr<std::shared_ptr<const PlannableJob>> Prepare(
      const semu::Job& job, const std::optional<semu::Layout>& pinned,
      const PrepareOptions& options) const = 0;

  // What costs layers where PrepareOptions say nothing else. Never null.
  virtual std::shared_ptr<const semu::CostModel> Costs() const = 0;

  // Plans a step. Of the search's budget, baselines heed `cancelled` alone.
  // Errors: RESOURCE_EXHAUSTED when the batch does not fit in memory;
  // FAILED_PRECONDITION when the strategy does not apply; INVALID_ARGUMENT for
  // a strategy that does not exist, or times and sizes out of proportion;
  // CANCELLED for a baseline.
  virtual absl::StatusOr<StepPlan> Plan(const PlannableJob& job,
                                        const semu::Batch& batch,
                                        const PlanOptions& options) const = 0;

  // The safe program: a fixed rule, in milliseconds (search/plan/safe_order.h).
  virtual absl::StatusOr<StepPlan> PlanSafe(const PlannableJob& job,
                                            const semu::Batch& batch) const = 0;

  // Names of strategies to compare, in the order of reports.
  virtual std::vector<std::string> StrategyNames() const = 0;
};

// The planner itself, with every strategy. Thread-safe.
std::unique_ptr<StepPlanner> MakeStepPlanner(
    std::shared_ptr<const semu::CostModel> costs);

// The same with analytic costs, reused within the planner.
std::unique_ptr<StepPlanner> MakeStepPlanner();

}  // namespace pipeweaver::search

#endif  // SEARCH_PLANNER_H_
