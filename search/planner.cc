#include "search/planner.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "search/lower/lower.h"
#include "search/lower/program_checker.h"
#include "search/partition/layout_planner.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem_builder.h"
#include "search/plan/plan_checker.h"
#include "search/plan/safe_order.h"
#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/registry.h"
#include "semu/base/status_macros.h"
#include "semu/cost/roofline_cost.h"

namespace pipeweaver::search {
namespace {

using WallClock = std::chrono::steady_clock;

int64_t NanosecondsSince(WallClock::time_point start) {
  return (WallClock::now() - start) / std::chrono::nanoseconds(1);
}

// One microbatch as heavy as the job says a microbatch may be: an item of each
// module, consumed along every edge.
semu::Batch HeaviestBatch(const semu::Job& job) {
  semu::Microbatch microbatch;
  for (const int64_t tokens : job.max_microbatch_tokens) {
    microbatch.item_tokens.push_back({tokens});
  }
  microbatch.uses.assign(job.edges.size(), {semu::ItemUse{0, 0}});
  semu::Batch batch;
  batch.microbatches.push_back(std::move(microbatch));
  return batch;
}

double BubbleRatio(const StageTimes& times) {
  int64_t busy_ns = 0;
  for (const auto& rank : times.ranks) {
    for (const StageTimes::Interval& stage : rank) {
      busy_ns += stage.end_ns - stage.start_ns;
    }
  }
  if (times.makespan_ns == 0) return 0;
  return 1 - static_cast<double>(busy_ns) /
                 (static_cast<double>(times.ranks.size()) * times.makespan_ns);
}

class Planner : public StepPlanner {
 public:
  absl::StatusOr<std::shared_ptr<const PlannableJob>> Prepare(
      const semu::Job& job,
      const std::optional<semu::Layout>& pinned) const override {
    auto prepared = std::make_shared<PlannableJob>();
    prepared->job = job;
    prepared->costs = std::make_shared<semu::RooflineCost>();
    prepared->layout = pinned ? *pinned : PlanLayout(job, *prepared->costs);
    PW_ASSIGN_OR_RETURN(MemoryPlan memory,
                        PlanMemory(job, prepared->layout, *prepared->costs));
    prepared->static_bytes = std::move(memory.static_bytes);
    prepared->activation_limit_bytes = std::move(memory.activation_limit_bytes);
    prepared->transfer_bytes = memory.transfer_bytes;
    // What fits the heaviest microbatch fits any: the safe order can always
    // hold one microbatch alone.
    if (const auto plan = PlanSafe(*prepared, HeaviestBatch(job)); !plan.ok()) {
      return absl::Status(
          plan.status().code(),
          absl::StrCat("a microbatch of max_microbatch_tokens (",
                       absl::StrJoin(job.max_microbatch_tokens, ", "),
                       ") by the safe program: ", plan.status().message()));
    }
    return std::shared_ptr<const PlannableJob>(std::move(prepared));
  }

  absl::StatusOr<StepPlan> Plan(const PlannableJob& job,
                                const semu::Batch& batch,
                                const PlanOptions& options) const override {
    const std::string name = options.strategy.empty()
                                 ? search::StrategyNames().front()
                                 : options.strategy;
    const std::unique_ptr<Strategy> strategy = MakeStrategy(name);
    if (strategy == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("strategy: ", name, ": must be one of ",
                       absl::StrJoin(StrategyNames(), ", ")));
    }
    StepPlan plan;
    PW_ASSIGN_OR_RETURN(plan.step, BuildProblem(job, batch));
    const WallClock::time_point start = WallClock::now();
    PW_ASSIGN_OR_RETURN(SearchResult result,
                        strategy->Solve(plan.step.problem, options.search));
    plan.report.search_ns = NanosecondsSince(start);
    plan.report.strategy = name;
    plan.report.evaluations = result.evaluations;
    plan.report.finished = !options.search.budget.deadline.has_value() ||
                           WallClock::now() < *options.search.budget.deadline;
    plan.schedule = std::move(result.schedule);
    return Finish(job, std::move(plan));
  }

  absl::StatusOr<StepPlan> PlanSafe(const PlannableJob& job,
                                    const semu::Batch& batch) const override {
    StepPlan plan;
    PW_ASSIGN_OR_RETURN(plan.step, BuildProblem(job, batch));
    PW_ASSIGN_OR_RETURN(plan.schedule, SafeOrder(plan.step.problem));
    plan.report.strategy = "safe";
    plan.report.finished = true;
    return Finish(job, std::move(plan));
  }

  std::vector<std::string> StrategyNames() const override {
    return search::StrategyNames();
  }

 private:
  static absl::StatusOr<StepProblem> BuildProblem(const PlannableJob& job,
                                                  const semu::Batch& batch) {
    return BuildStepProblem(job.job, job.layout, job.activation_limit_bytes,
                            batch, *job.costs);
  }

  // Times, checks and lowers the schedule of `plan`, and completes its report.
  static absl::StatusOr<StepPlan> Finish(const PlannableJob& job,
                                         StepPlan plan) {
    const Problem& problem = plan.step.problem;
    StepReport& report = plan.report;
    const ProblemGraph graph = BuildProblemGraph(problem);
    PW_ASSIGN_OR_RETURN(plan.times, TimeSchedule(graph, plan.schedule));

    WallClock::time_point start = WallClock::now();
    PW_RETURN_IF_ERROR(CheckPlan(problem, plan.schedule, plan.times));
    report.check_ns = NanosecondsSince(start);

    ProgramLimits limits;
    for (const int64_t bytes : job.activation_limit_bytes) {
      limits.memory_limit_bytes.push_back(bytes + job.transfer_bytes);
    }
    limits.max_receives_ahead = job.job.executor.max_receives_ahead;
    start = WallClock::now();
    PW_ASSIGN_OR_RETURN(plan.programs,
                        Lower(plan.step, plan.schedule, plan.times, limits));
    report.lower_ns = NanosecondsSince(start);

    start = WallClock::now();
    PW_RETURN_IF_ERROR(CheckPrograms(plan.step, plan.programs, limits));
    report.check_ns += NanosecondsSince(start);

    report.makespan_ns = plan.programs.makespan_ns;
    report.schedule_makespan_ns = plan.times.makespan_ns;
    report.lower_bound_ns = LowerBound(graph);
    report.memory_bound_ns = report.lower_bound_ns;
    report.bubble_ratio = BubbleRatio(plan.times);
    report.measured_share = plan.step.measured_share;
    for (size_t rank = 0; rank < job.static_bytes.size(); ++rank) {
      report.peak_memory_bytes.push_back(job.static_bytes[rank] -
                                         job.transfer_bytes +
                                         plan.programs.peak_bytes[rank]);
    }
    return plan;
  }
};

}  // namespace

std::unique_ptr<StepPlanner> MakeStepPlanner() {
  return std::make_unique<Planner>();
}

}  // namespace pipeweaver::search
