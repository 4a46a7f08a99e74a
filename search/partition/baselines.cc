// Chain layout, static order, and the choice of virtual stages and recompute.

#include "search/partition/baselines.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "search/partition/layer_partition.h"
#include "search/partition/layout_planner.h"
#include "search/partition/step_problem_builder.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/cost/weight_memory.h"
#include "semu/model/job_proto.h"
#include "semu/model/layer_size.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Batch;
using semu::Job;
using semu::MemoryStrategy;

constexpr int kMostVirtualStages = 4;
constexpr int64_t kMostTurns = int64_t{1} << 20;
// Of a rank's memory, for weights and what belongs to them.
constexpr double kWeightShares[] = {0.8, 0.65, 0.5, 0.35};

// Parameters, and bytes of weights with what belongs to them, of each layer in
// chain order.
struct LayerSizes {
  std::vector<int64_t> parameters;
  std::vector<int64_t> bytes;
};
LayerSizes SizesOf(const Job& job) {
  LayerSizes sizes;
  for (int m : semu::TopologicalOrder(job)) {
    for (const semu::LayerGroup& group : job.modules[m].layers) {
      sizes.parameters.insert(sizes.parameters.end(), group.count,
                              semu::ParameterCount(group.layer));
      sizes.bytes.insert(
          sizes.bytes.end(), group.count,
          semu::WeightMemoryOf(job, group.layer, !job.modules[m].frozen)
              .Total());
    }
  }
  return sizes;
}

// Time of each layer in the mean microbatch, in chain order.
std::vector<int64_t> TimeWeights(const Job& job, const Batch& batch,
                                 const semu::CostModel& costs) {
  const LayerTimes times = MeanLayerTimes(job, batch, costs);
  std::vector<int64_t> weights;
  for (int m : semu::TopologicalOrder(job)) {
    weights.insert(weights.end(), times[m].begin(), times[m].end());
  }
  return weights;
}

// [rank]: the schedule of the chain's order. The problem was built for a
// ChainLayout of whole microbatches.
Schedule ChainSchedule(const Job& job, const Chain& chain,
                       const StepProblem& step, int microbatches,
                       int virtual_stages) {
  const int ranks = job.parallelism.pipeline_parallel;
  const Problem& problem = step.problem;
  std::vector<int> position(job.modules.size());
  const std::vector<int> order = semu::TopologicalOrder(job);
  for (size_t i = 0; i < order.size(); ++i) {
    position[order[i]] = static_cast<int>(i);
  }
  // [rank][virtual stage][microbatch]: forwards, in chain order.
  using Stages = std::vector<ScheduledStage>;
  std::vector<std::vector<std::vector<Stages>>> turns(
      ranks, std::vector<std::vector<Stages>>(
                 virtual_stages, std::vector<Stages>(microbatches)));
  std::vector<int> sweeps(problem.sweeps.size());
  for (size_t i = 0; i < sweeps.size(); ++i) sweeps[i] = static_cast<int>(i);
  const auto module_of = [&step](int sweep) {
    return step.sub_microbatches[step.sweeps[sweep].sub_microbatch].module;
  };
  std::stable_sort(sweeps.begin(), sweeps.end(), [&](int a, int b) {
    return position[module_of(a)] < position[module_of(b)];
  });
  for (int i : sweeps) {
    const SweepOrigin& origin = step.sweeps[i];
    const int module = module_of(i);
    const int virtual_stage = chain.virtual_stage[module][origin.segment];
    const auto& chunks =
        chain.layout.modules[module].segments[origin.segment].chunks;
    for (size_t c = 0; c < chunks.size(); ++c) {
      turns[chunks[c].rank][virtual_stage][problem.sweeps[i].microbatch]
          .push_back({StageKind::kForward, i, static_cast<int>(c), 0});
    }
  }
  Schedule schedule;
  schedule.ranks.resize(ranks);
  for (int r = 0; r < ranks; ++r) {
    for (const ChainTurn& turn :
         ChainOrder(ranks, r, microbatches, virtual_stages)) {
      if (turn.microbatch >= microbatches) continue;
      const Stages& stages = turns[r][turn.virtual_stage][turn.microbatch];
      if (turn.forward) {
        schedule.ranks[r].insert(schedule.ranks[r].end(), stages.begin(),
                                 stages.end());
        continue;
      }
      for (auto stage = stages.rbegin(); stage != stages.rend(); ++stage) {
        if (!problem.sweeps[stage->sweep].backward) continue;
        schedule.ranks[r].push_back(*stage);
        schedule.ranks[r].back().kind = StageKind::kBackward;
      }
    }
  }
  return schedule;
}

}  // namespace

absl::string_view BaselineName(Baseline baseline) {
  switch (baseline) {
    case Baseline::kMegatron:
      return "megatron";
    case Baseline::k1f1b:
      return "1f1b";
    case Baseline::kInterleaved1f1b:
      return "interleaved-1f1b";
  }
  PW_CHECK(false && "unknown baseline");
}

std::optional<Baseline> BaselineFromName(absl::string_view name) {
  for (Baseline baseline :
       {Baseline::kMegatron, Baseline::k1f1b, Baseline::kInterleaved1f1b}) {
    if (name == BaselineName(baseline)) return baseline;
  }
  return std::nullopt;
}

Chain MakeChain(const Job& job, const std::vector<int>& chunk_lengths) {
  const int ranks = job.parallelism.pipeline_parallel;
  Chain chain;
  chain.layout.modules.resize(job.modules.size());
  chain.virtual_stage.resize(job.modules.size());
  int chunk = 0;
  int left = chunk_lengths[0];
  for (int m : semu::TopologicalOrder(job)) {
    semu::ModuleLayout& module = chain.layout.modules[m];
    std::vector<int>& virtual_stage = chain.virtual_stage[m];
    module.sub_microbatch_tokens = semu::kMaxMicrobatchTokens;
    const int layers = job.modules[m].NumLayers();
    int next = 0;
    while (next < layers) {
      while (left == 0) left = chunk_lengths[++chunk];
      const int taken = std::min(left, layers - next);
      if (virtual_stage.empty() || virtual_stage.back() != chunk / ranks) {
        virtual_stage.push_back(chunk / ranks);
        module.segments.emplace_back();
      }
      module.segments.back().chunks.push_back({chunk % ranks, next, taken});
      next += taken;
      left -= taken;
    }
  }
  return chain;
}

std::vector<ChainTurn> ChainOrder(int ranks, int rank, int microbatches,
                                  int virtual_stages) {
  const int groups = (microbatches + ranks - 1) / ranks;
  const int filled = virtual_stages == 1 ? microbatches : groups * ranks;
  const int total = filled * virtual_stages;
  const auto turn = [&](bool forward, int k) {
    if (virtual_stages == 1) return ChainTurn{forward, k, 0};
    const int in_group = k % (ranks * virtual_stages);
    const int stage = in_group / ranks;
    return ChainTurn{forward, k / (ranks * virtual_stages) * ranks + k % ranks,
                     forward ? stage : virtual_stages - 1 - stage};
  };
  const int ahead = ranks - 1 - rank;
  const int warm_up = std::min(
      total,
      virtual_stages == 1 ? ahead : 2 * ahead + (virtual_stages - 1) * ranks);
  std::vector<ChainTurn> order;
  order.reserve(2 * total);
  for (int k = 0; k < warm_up; ++k) order.push_back(turn(true, k));
  for (int k = warm_up; k < total; ++k) {
    order.push_back(turn(true, k));
    order.push_back(turn(false, k - warm_up));
  }
  for (int k = total - warm_up; k < total; ++k) {
    order.push_back(turn(false, k));
  }
  return order;
}

absl::StatusOr<BaselinePlan> PlanBaseline(Baseline baseline, const Job& job,
                                          const Batch& reference,
                                          const Batch& batch,
                                          const semu::CostModel& costs) {
  const int ranks = job.parallelism.pipeline_parallel;
  const int microbatches = static_cast<int>(batch.microbatches.size());
  const LayerSizes sizes = SizesOf(job);
  const int layers = static_cast<int>(sizes.bytes.size());
  if (layers < ranks) {
    return absl::FailedPreconditionError(
        absl::StrCat("baseline ", BaselineName(baseline),
                     " needs a layer a rank: the job has ", layers,
                     " layers on ", ranks, " ranks"));
  }
  if (int64_t{ranks} * microbatches > kMostTurns) {
    return absl::FailedPreconditionError(
        absl::StrCat("baseline ", BaselineName(baseline), " has ", microbatches,
                     " microbatches on ", ranks,
                     " ranks: their product must be at most ", kMostTurns));
  }
  const std::vector<int64_t> weights = baseline == Baseline::kMegatron
                                           ? sizes.parameters
                                           : TimeWeights(job, reference, costs);
  const int most_stages =
      baseline == Baseline::k1f1b
          ? 1
          : std::min({kMostVirtualStages, job.executor.max_segments,
                      layers / ranks});
  std::vector<MemoryStrategy> strategies = {MemoryStrategy::kKeep};
  if (job.executor.selective_recompute) {
    strategies.push_back(MemoryStrategy::kSelectiveRecompute);
  }
  if (job.executor.full_recompute) {
    strategies.push_back(MemoryStrategy::kFullRecompute);
  }

  std::optional<BaselinePlan> best;
  absl::Status failure;
  for (int v = 1; v <= most_stages; ++v) {
    std::vector<std::vector<int>> cuts = {PartitionLayers(weights, ranks * v)};
    if (baseline != Baseline::kMegatron) {
      for (double share : kWeightShares) {
        const std::optional<std::vector<int>> cut = PartitionLayersWithin(
            weights, ranks * v, sizes.bytes,
            static_cast<int64_t>(share *
                                 static_cast<double>(job.memory_budget_bytes)) /
                v);
        if (cut.has_value() && *cut != cuts.back()) cuts.push_back(*cut);
      }
    }
    for (const std::vector<int>& cut : cuts) {
      const Chain chain = MakeChain(job, cut);
      absl::StatusOr<MemoryPlan> memory = PlanMemory(job, chain.layout, costs);
      if (!memory.ok()) {
        failure = memory.status();
        continue;
      }
      for (MemoryStrategy strategy : strategies) {
        BaselinePlan plan;
        PW_ASSIGN_OR_RETURN(
            plan.step,
            BuildStepProblem(job, chain.layout, memory->activation_limit_bytes,
                             batch, costs,
                             {.strategy = strategy, .split_backward = false}));
        plan.schedule = ChainSchedule(job, chain, plan.step, microbatches, v);
        const ProblemGraph graph = BuildProblemGraph(plan.step.problem);
        PW_ASSIGN_OR_RETURN(plan.times, TimeSchedule(graph, plan.schedule));
        failure = CheckMemory(graph, plan.schedule);
        if (!failure.ok()) continue;
        if (!best.has_value() ||
            plan.times.makespan_ns < best->times.makespan_ns) {
          plan.layout = chain.layout;
          plan.memory = *memory;
          plan.virtual_stages = v;
          plan.strategy = strategy;
          best = std::move(plan);
        }
        break;
      }
    }
  }
  if (best.has_value()) return *std::move(best);
  return failure;
}

}  // namespace pipeweaver::search
