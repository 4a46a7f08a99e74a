// Layouts to try, schedules on them, and the choice of the fastest that fits.

#include "search/partition/baselines.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "search/partition/bubble_filler.h"
#include "search/partition/layer_chain.h"
#include "search/partition/layer_partition.h"
#include "search/partition/layout_planner.h"
#include "search/partition/step_problem_builder.h"
#include "search/plan/safe_order.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Batch;
using semu::Job;
using semu::MemoryStrategy;

constexpr Baseline kAll[] = {
    Baseline::kMegatron, Baseline::k1f1b,    Baseline::kInterleaved1f1b,
    Baseline::kNnScaler, Baseline::kOptimus, Baseline::kNested,
    Baseline::kGpipe,    Baseline::kZbH1,    Baseline::kZbV};

// Microbatches times ranks.
constexpr int64_t kMostTurns = int64_t{1} << 20;

using ChainOrders = std::vector<std::vector<ChainTurn>>;  // [rank]

// Schedules of a step, each to be tried; none may fit.
using Scheduler = std::function<std::vector<Schedule>(const StepProblem&,
                                                      const ProblemGraph&)>;

// The fastest plan so far, and why there is none.
struct Best {
  std::optional<BaselinePlan> plan;
  absl::Status failure =
      absl::FailedPreconditionError("no schedule of it fits the batch");
};

absl::Status DoesNotApply(Baseline baseline, absl::string_view why) {
  return absl::FailedPreconditionError(
      absl::StrCat("baseline ", BaselineName(baseline), " ", why));
}

// Whether the baseline's orders by `rule` are short enough.
absl::Status CheckTurns(Baseline baseline, ChainRule rule, int ranks,
                        int microbatches, int virtual_stages) {
  const int filled =
      FilledMicrobatches(rule, ranks, microbatches, virtual_stages);
  if (int64_t{ranks} * filled <= kMostTurns) return absl::OkStatus();
  return DoesNotApply(
      baseline,
      absl::StrCat("has ", filled, " microbatches on ", ranks, " ranks, ",
                   filled - microbatches,
                   " of which fill its order up: their product must be at "
                   "most ",
                   kMostTurns));
}

class BaselinePlanner {
 public:
  BaselinePlanner(const Job& job, const Batch& reference, const Batch& batch,
                  const semu::CostModel& costs,
                  const std::atomic<bool>* cancelled)
      : job_(job),
        reference_(reference),
        batch_(batch),
        costs_(costs),
        cancelled_(cancelled),
        modules_(semu::TopologicalOrder(job)),
        ranks_(job.parallelism.pipeline_parallel),
        microbatches_(static_cast<int>(batch.microbatches.size())) {}

  // Tries all chains of 1 to `most_stages` virtual stages in 1F1B order.
  absl::Status TryInterleaved(const ChainWeights& weights, bool by_parameters,
                              int most_stages) {
    for (int v = 1; v <= most_stages; ++v) {
      std::vector<std::vector<int>> cuts;
      if (by_parameters) {
        cuts = {PartitionLayers(weights.parameters, ranks_ * v)};
      } else {
        cuts = CutsByTime(weights, ranks_, v, job_.memory_budget_bytes);
      }
      PW_RETURN_IF_ERROR(TryChains(cuts, ChainRule::k1f1b, /*v_shaped=*/false));
    }
    return absl::OkStatus();
  }

  absl::Status TryChains(const std::vector<std::vector<int>>& cuts,
                         ChainRule rule, bool v_shaped) {
    for (const std::vector<int>& cut : cuts) {
      const Chain chain = MakeChain(job_, modules_, cut, v_shaped);
      const ChainOrders orders = OrdersOf(rule, chain.virtual_stages);
      const bool split =
          rule == ChainRule::kZeroBubbleH1 || rule == ChainRule::kZeroBubbleV;
      PW_RETURN_IF_ERROR(Try(
          chain.layout, chain.virtual_stages, split,
          [&](const StepProblem& step, const ProblemGraph& graph) {
            return std::vector{ChainSchedule(job_, chain, step, graph, orders)};
          }));
    }
    return absl::OkStatus();
  }

  absl::Status TryOptimus(int most_stages) {
    PW_ASSIGN_OR_RETURN(const int backbone, FindBackbone());
    PW_ASSIGN_OR_RETURN(const ChainWeights weights,
                        WeighChain(job_, {backbone}, reference_, costs_));
    PW_ASSIGN_OR_RETURN(const LayerTimes times,
                        MeanLayerTimes(job_, reference_, costs_));
    const int layers = job_.modules[backbone].NumLayers();
    if (layers < ranks_) {
      return absl::FailedPreconditionError(
          absl::StrCat("the backbone, module \"", job_.modules[backbone].name,
                       "\", has ", layers,
                       " layers: must have at least one for "
                       "each of the ",
                       ranks_, " ranks"));
    }
    most_stages = std::min(most_stages, layers / ranks_);
    PW_RETURN_IF_ERROR(CheckTurns(Baseline::kOptimus, ChainRule::k1f1b, ranks_,
                                  microbatches_, most_stages));
    for (int v = 1; v <= most_stages; ++v) {
      for (const std::vector<int>& cut :
           CutsByTime(weights, ranks_, v, job_.memory_budget_bytes)) {
        Chain chain = MakeChain(job_, {backbone}, cut, /*v_shaped=*/false);
        for (const int m : modules_) {
          if (m != backbone) SpreadOverRanks(m, times[m], &chain);
        }
        const ChainOrders orders = OrdersOf(ChainRule::k1f1b, v);
        PW_RETURN_IF_ERROR(Try(
            chain.layout, v, /*split=*/false,
            [&](const StepProblem& step, const ProblemGraph& graph) {
              return FillAll(step.problem, graph,
                             ChainSchedule(job_, chain, step, graph, orders));
            }));
      }
    }
    return absl::OkStatus();
  }

  absl::Status TryNested() {
    PW_ASSIGN_OR_RETURN(const LayerTimes times,
                        MeanLayerTimes(job_, reference_, costs_));
    LayoutShape shape;
    for (size_t m = 0; m < job_.modules.size(); ++m) {
      shape.modules.push_back({job_.max_microbatch_tokens[m], 1, {false}});
    }
    absl::Status unsafe;
    // The order runs the less at once the less memory there is: strategies that
    // take longer but hold less may end sooner.
    PW_RETURN_IF_ERROR(Try(
        PlaceLayers(job_, shape, times), 1, /*split=*/false,
        [&](const StepProblem& step, const ProblemGraph&) {
          absl::StatusOr<Schedule> schedule = SafeOrder(step.problem);
          unsafe = schedule.status();
          return schedule.ok() ? std::vector{*std::move(schedule)}
                               : std::vector<Schedule>();
        },
        /*all_strategies=*/true));
    if (!unsafe.ok()) best_.failure = unsafe;
    return absl::OkStatus();
  }

  absl::Status TryStaticPlan(const StaticPlan& plan) {
    return TryWithStrategy(
        plan.chain.layout, plan.memory, plan.chain.virtual_stages,
        plan.strategy, /*split=*/false,
        [&](const StepProblem& step, const ProblemGraph& graph) {
          return std::vector{
              ChainSchedule(job_, plan.chain, step, graph, plan.order)};
        });
  }

  bool found() const { return best_.plan.has_value(); }

  absl::StatusOr<BaselinePlan> Result() {
    PW_RETURN_IF_ERROR(CheckCancelled());
    if (best_.plan.has_value()) return *std::move(best_.plan);
    return best_.failure;
  }

 private:
  bool Cancelled() const { return cancelled_ != nullptr && cancelled_->load(); }
  absl::Status CheckCancelled() const {
    return Cancelled() ? absl::CancelledError("the baseline was cancelled")
                       : absl::OkStatus();
  }

  ChainOrders OrdersOf(ChainRule rule, int virtual_stages) const {
    ChainOrders orders;
    for (int r = 0; r < ranks_; ++r) {
      orders.push_back(
          ChainOrder(rule, ranks_, r, microbatches_, virtual_stages));
    }
    return orders;
  }

  // Tries the strategies on a layout, fastest first: up to one that fits, or
  // all.
  absl::Status Try(const semu::Layout& layout, int virtual_stages, bool split,
                   const Scheduler& scheduler, bool all_strategies = false) {
    const absl::StatusOr<MemoryPlan> memory = PlanMemory(job_, layout, costs_);
    if (!memory.ok()) {
      best_.failure = memory.status();
      return absl::OkStatus();
    }
    for (const MemoryStrategy strategy : UniformStrategies(job_)) {
      fits_ = false;
      PW_RETURN_IF_ERROR(TryWithStrategy(layout, *memory, virtual_stages,
                                         strategy, split, scheduler));
      if (fits_ && !all_strategies) break;
    }
    return absl::OkStatus();
  }

  absl::Status TryWithStrategy(const semu::Layout& layout,
                               const MemoryPlan& memory, int virtual_stages,
                               MemoryStrategy strategy, bool split,
                               const Scheduler& scheduler) {
    PW_RETURN_IF_ERROR(CheckCancelled());
    PW_ASSIGN_OR_RETURN(
        StepProblem step,
        BuildStepProblem(job_, layout, memory.activation_limit_bytes, batch_,
                         costs_,
                         {.strategy = strategy,
                          .split_backward = split,
                          .layer_reserve_bytes = memory.layer_reserve_bytes}));
    const ProblemGraph graph = BuildProblemGraph(step.problem);
    for (Schedule& schedule : scheduler(step, graph)) {
      PW_ASSIGN_OR_RETURN(StageTimes times, TimeSchedule(graph, schedule));
      const absl::Status memory_status = CheckMemory(graph, schedule);
      if (!memory_status.ok()) {
        best_.failure = memory_status;
        continue;
      }
      fits_ = true;
      if (best_.plan.has_value() &&
          best_.plan->times.makespan_ns <= times.makespan_ns) {
        continue;
      }
      best_.plan = BaselinePlan{
          layout,           memory,         step,    std::move(schedule),
          std::move(times), virtual_stages, strategy};
    }
    return absl::OkStatus();
  }

  absl::StatusOr<int> FindBackbone() const {
    std::vector<bool> consumed(job_.modules.size(), false);
    for (const semu::ModuleEdge& edge : job_.edges) {
      consumed[edge.producer] = true;
    }
    if (std::count(consumed.begin(), consumed.end(), false) != 1) {
      return absl::FailedPreconditionError(
          "baseline optimus* needs one backbone: several modules are consumed "
          "by none");
    }
    return static_cast<int>(std::find(consumed.begin(), consumed.end(), false) -
                            consumed.begin());
  }

  // One segment over all ranks, or as many as the module has layers.
  void SpreadOverRanks(int module, const std::vector<int64_t>& times,
                       Chain* chain) const {
    semu::PipelineSegment segment;
    int next = 0;
    const std::vector<int> lengths = PartitionLayers(times, ranks_);
    for (int r = 0; r < ranks_; ++r) {
      if (lengths[r] == 0) continue;
      segment.chunks.push_back({r, next, lengths[r]});
      next += lengths[r];
    }
    chain->layout.modules[module].segments = {std::move(segment)};
    chain->virtual_stage[module] = {-1};
  }

  // Fewer and fewer microbatches begun at once, from all of them on; none once
  // cancelled.
  std::vector<Schedule> FillAll(const Problem& problem,
                                const ProblemGraph& graph,
                                const Schedule& order) const {
    std::vector<Schedule> schedules;
    for (const int begun : {microbatches_, 8 * ranks_, 4 * ranks_, 3 * ranks_,
                            2 * ranks_, ranks_}) {
      if (begun > microbatches_) continue;
      for (const bool backward_first : {false, true}) {
        for (const bool waits : {false, true}) {
          if (Cancelled()) return {};
          std::optional<Schedule> schedule = FillBubbles(
              problem, graph, order, {begun, backward_first, waits});
          if (schedule.has_value()) schedules.push_back(*std::move(schedule));
        }
      }
    }
    return schedules;
  }

  const Job& job_;
  const Batch& reference_;
  const Batch& batch_;
  const semu::CostModel& costs_;
  const std::atomic<bool>* const cancelled_;  // may be null
  const std::vector<int> modules_;            // in topological order
  const int ranks_;
  const int microbatches_;
  Best best_;
  bool fits_ = false;  // the strategy tried last
};

// `most_stages`: virtual stages, where the baseline interleaves.
absl::Status CheckApplies(Baseline baseline, const Job& job, int layers,
                          int microbatches, int most_stages) {
  const int ranks = job.parallelism.pipeline_parallel;
  if (layers < ranks) {
    return DoesNotApply(baseline,
                        absl::StrCat("needs a layer a rank: the job "
                                     "has ",
                                     layers, " layers on ", ranks, " ranks"));
  }
  if ((baseline == Baseline::kZbH1 || baseline == Baseline::kZbV) &&
      !job.executor.split_backward) {
    return DoesNotApply(baseline,
                        "splits backwards: executor.split_backward is false");
  }
  if (baseline == Baseline::kZbV) {
    if (!job.executor.v_placement || job.executor.max_segments < 2) {
      return DoesNotApply(
          baseline,
          absl::StrCat("places chunks on a V: executor.v_placement is ",
                       job.executor.v_placement ? "true" : "false",
                       " and executor.max_segments ", job.executor.max_segments,
                       ", must be true and at least 2"));
    }
    if (layers < 2 * ranks) {
      return DoesNotApply(baseline,
                          absl::StrCat("needs two layers a rank: the job has ",
                                       layers, " layers on ", ranks, " ranks"));
    }
  }
  switch (baseline) {
    case Baseline::kMegatron:
    case Baseline::kInterleaved1f1b:
    case Baseline::kNnScaler:
      return CheckTurns(baseline, ChainRule::k1f1b, ranks, microbatches,
                        most_stages);
    case Baseline::kZbV:
      return CheckTurns(baseline, ChainRule::kZeroBubbleV, ranks, microbatches,
                        /*virtual_stages=*/2);
    case Baseline::k1f1b:
    case Baseline::kOptimus:  // its backbone's virtual stages are checked later
    case Baseline::kNested:
    case Baseline::kGpipe:
    case Baseline::kZbH1:
      return CheckTurns(baseline, ChainRule::k1f1b, ranks, microbatches,
                        /*virtual_stages=*/1);
  }
  PW_CHECK(false && "unknown baseline");
}

}  // namespace

absl::Span<const Baseline> AllBaselines() { return kAll; }

absl::string_view BaselineName(Baseline baseline) {
  switch (baseline) {
    case Baseline::kMegatron:
      return "megatron";
    case Baseline::k1f1b:
      return "1f1b";
    case Baseline::kInterleaved1f1b:
      return "interleaved-1f1b";
    case Baseline::kNnScaler:
      return "nnscaler*";
    case Baseline::kOptimus:
      return "optimus*";
    case Baseline::kNested:
      return "nested";
    case Baseline::kGpipe:
      return "gpipe";
    case Baseline::kZbH1:
      return "zb-h1";
    case Baseline::kZbV:
      return "zb-v";
  }
  PW_CHECK(false && "unknown baseline");
}

std::optional<Baseline> BaselineFromName(absl::string_view name) {
  for (const Baseline baseline : kAll) {
    if (name == BaselineName(baseline)) return baseline;
  }
  return std::nullopt;
}

absl::StatusOr<BaselinePlan> PlanStatically(absl::Span<const StaticPlan> plans,
                                            const Job& job, const Batch& batch,
                                            const semu::CostModel& costs) {
  PW_CHECK(!plans.empty());
  BaselinePlanner planner(job, batch, batch, costs, /*cancelled=*/nullptr);
  for (const StaticPlan& plan : plans) {
    PW_RETURN_IF_ERROR(planner.TryStaticPlan(plan));
    if (planner.found()) break;
  }
  return planner.Result();
}

absl::StatusOr<BaselinePlan> PlanBaseline(Baseline baseline, const Job& job,
                                          const Batch& reference,
                                          const Batch& batch,
                                          const semu::CostModel& costs,
                                          const std::atomic<bool>* cancelled) {
  const int ranks = job.parallelism.pipeline_parallel;
  const int microbatches = static_cast<int>(batch.microbatches.size());
  const std::vector<int> modules = semu::TopologicalOrder(job);
  PW_ASSIGN_OR_RETURN(const ChainWeights weights,
                      WeighChain(job, modules, reference, costs));
  const int layers = static_cast<int>(weights.bytes.size());
  const int most_stages =
      std::min({kMostVirtualStages, job.executor.max_segments, layers / ranks});
  PW_RETURN_IF_ERROR(
      CheckApplies(baseline, job, layers, microbatches, most_stages));
  const auto cuts = [&](int chunks_per_rank) {
    return CutsByTime(weights, ranks, chunks_per_rank, job.memory_budget_bytes);
  };

  BaselinePlanner planner(job, reference, batch, costs, cancelled);
  switch (baseline) {
    case Baseline::kMegatron:
      PW_RETURN_IF_ERROR(
          planner.TryInterleaved(weights, /*by_parameters=*/true, most_stages));
      break;
    case Baseline::k1f1b:
      PW_RETURN_IF_ERROR(planner.TryInterleaved(weights, false, 1));
      break;
    case Baseline::kInterleaved1f1b:
      PW_RETURN_IF_ERROR(planner.TryInterleaved(weights, false, most_stages));
      break;
    case Baseline::kNnScaler: {
      PW_ASSIGN_OR_RETURN(
          const std::vector<StaticPlan> plans,
          FindStaticPlans(job, reference, microbatches, costs, cancelled));
      return PlanStatically(plans, job, batch, costs);
    }
    case Baseline::kOptimus:
      PW_RETURN_IF_ERROR(planner.TryOptimus(most_stages));
      break;
    case Baseline::kNested:
      PW_RETURN_IF_ERROR(planner.TryNested());
      break;
    case Baseline::kGpipe:
      PW_RETURN_IF_ERROR(planner.TryChains(cuts(1), ChainRule::kGpipe, false));
      break;
    case Baseline::kZbH1:
      PW_RETURN_IF_ERROR(
          planner.TryChains(cuts(1), ChainRule::kZeroBubbleH1, false));
      break;
    case Baseline::kZbV:
      PW_RETURN_IF_ERROR(
          planner.TryChains(cuts(2), ChainRule::kZeroBubbleV, true));
      break;
  }
  return planner.Result();
}

}  // namespace pipeweaver::search
