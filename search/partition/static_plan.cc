// Chains, their mean microbatch as a scheduling problem, and its search.

#include "search/partition/static_plan.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "search/partition/step_problem_builder.h"
#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_validation.h"
#include "search/problem/timing.h"
#include "search/strategy/portfolio.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Job;

constexpr int kSearched = 3;
constexpr int kEvaluations = 64;

// The chain's mean microbatch, `microbatches` times: a sweep for each virtual
// stage with one stage a rank. `step` was built for the chain.
Problem MeanProblem(const Chain& chain, const StepProblem& step,
                    int reference_microbatches, int microbatches) {
  const Problem& problem = step.problem;
  // [virtual stage][rank]: sums over the reference.
  std::vector<std::vector<Choice>> sums(chain.virtual_stages,
                                        std::vector<Choice>(problem.ranks));
  std::vector<std::vector<int64_t>> transfers(
      chain.virtual_stages, std::vector<int64_t>(problem.ranks, 0));
  for (size_t i = 0; i < problem.sweeps.size(); ++i) {
    const int module =
        step.sub_microbatches[step.sweeps[i].sub_microbatch].module;
    const int v = chain.virtual_stage[module][step.sweeps[i].segment];
    const Sweep& sweep = problem.sweeps[i];
    for (const Stage& stage : sweep.stages) {
      const Choice& choice = stage.choices[0];
      Choice& sum = sums[v][stage.rank];
      sum.forward_ns += choice.forward_ns;
      if (sweep.backward) {
        sum.input_grad_ns += choice.input_grad_ns + choice.weight_grad_ns;
        sum.activation_bytes += choice.activation_bytes;
        sum.backward_bytes += choice.backward_bytes;
      }
      transfers[v][stage.rank] += stage.transfer_ns;
    }
  }
  Problem mean;
  mean.ranks = problem.ranks;
  mean.memory_limit_bytes = problem.memory_limit_bytes;
  for (int b = 0; b < microbatches; ++b) {
    for (int v = 0; v < chain.virtual_stages; ++v) {
      Sweep& sweep = mean.sweeps.emplace_back();
      sweep.id = absl::StrCat("mb", b, "/", v);
      sweep.microbatch = b;
      if (v > 0) sweep.after = {static_cast<int>(mean.sweeps.size()) - 2};
      for (int r = 0; r < mean.ranks; ++r) {
        Choice choice = sums[v][r];
        choice.forward_ns /= reference_microbatches;
        choice.input_grad_ns /= reference_microbatches;
        choice.activation_bytes /= reference_microbatches;
        choice.backward_bytes /= reference_microbatches;
        sweep.stages.push_back(
            {r, transfers[v][r] / reference_microbatches, {choice}});
      }
    }
  }
  return mean;
}

Schedule ToSchedule(const std::vector<std::vector<ChainTurn>>& order,
                    int virtual_stages) {
  Schedule schedule;
  for (size_t r = 0; r < order.size(); ++r) {
    std::vector<ScheduledStage>& rank = schedule.ranks.emplace_back();
    for (const ChainTurn& turn : order[r]) {
      rank.push_back({turn.kind,
                      turn.microbatch * virtual_stages + turn.virtual_stage,
                      static_cast<int>(r), 0});
    }
  }
  return schedule;
}

std::vector<std::vector<ChainTurn>> ToTurns(const Schedule& schedule,
                                            int virtual_stages) {
  std::vector<std::vector<ChainTurn>> order;
  for (const auto& rank : schedule.ranks) {
    std::vector<ChainTurn>& turns = order.emplace_back();
    for (const ScheduledStage& stage : rank) {
      turns.push_back({stage.kind, stage.sweep / virtual_stages,
                       stage.sweep % virtual_stages});
    }
  }
  return order;
}

struct Candidate {
  StaticPlan plan;
  Problem mean;
};

// The plan in 1F1B order. RESOURCE_EXHAUSTED: it does not fit.
absl::StatusOr<Candidate> MakeCandidate(const Job& job, const Chain& chain,
                                        const MemoryPlan& memory,
                                        semu::MemoryStrategy strategy,
                                        const semu::Batch& reference,
                                        int microbatches,
                                        const semu::CostModel& costs) {
  const int ranks = job.parallelism.pipeline_parallel;
  PW_ASSIGN_OR_RETURN(
      const StepProblem step,
      BuildStepProblem(job, chain.layout, memory.activation_limit_bytes,
                       reference, costs,
                       {.strategy = strategy,
                        .split_backward = false,
                        .layer_reserve_bytes = memory.layer_reserve_bytes}));
  Candidate candidate;
  candidate.mean =
      MeanProblem(chain, step, static_cast<int>(reference.microbatches.size()),
                  microbatches);
  if (const absl::Status valid = ValidateProblem(candidate.mean); !valid.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the mean microbatch ", microbatches,
                     " times as a problem: ", valid.message()));
  }
  StaticPlan& plan = candidate.plan;
  plan.chain = chain;
  plan.memory = memory;
  plan.strategy = strategy;
  for (int r = 0; r < ranks; ++r) {
    plan.order.push_back(ChainOrder(ChainRule::k1f1b, ranks, r, microbatches,
                                    chain.virtual_stages));
  }
  const ProblemGraph graph = BuildProblemGraph(candidate.mean);
  const Schedule schedule = ToSchedule(plan.order, chain.virtual_stages);
  PW_ASSIGN_OR_RETURN(const StageTimes times, TimeSchedule(graph, schedule));
  PW_RETURN_IF_ERROR(CheckMemory(graph, schedule));
  plan.mean_batch_ns = times.makespan_ns;
  return candidate;
}

}  // namespace

absl::StatusOr<std::vector<StaticPlan>> FindStaticPlans(
    const Job& job, const semu::Batch& reference, int microbatches,
    const semu::CostModel& costs, const std::atomic<bool>* cancelled) {
  const auto check_cancelled = [cancelled] {
    return cancelled != nullptr && cancelled->load()
               ? absl::CancelledError("the static plans were cancelled")
               : absl::OkStatus();
  };
  PW_CHECK(!reference.microbatches.empty() && microbatches >= 1);
  const int ranks = job.parallelism.pipeline_parallel;
  const std::vector<int> modules = semu::TopologicalOrder(job);
  PW_ASSIGN_OR_RETURN(const ChainWeights weights,
                      WeighChain(job, modules, reference, costs));
  const int layers = static_cast<int>(weights.bytes.size());
  const int most_stages =
      std::min({kMostVirtualStages, job.executor.max_segments, layers / ranks});
  std::vector<Candidate> candidates;
  absl::Status failure;
  for (int v = 1; v <= most_stages; ++v) {
    for (const std::vector<int>& cut :
         CutsByTime(weights, ranks, v, job.memory_budget_bytes)) {
      const Chain chain = MakeChain(job, modules, cut, /*v_shaped=*/false);
      const absl::StatusOr<MemoryPlan> memory =
          PlanMemory(job, chain.layout, costs);
      if (!memory.ok()) {
        failure = memory.status();
        continue;
      }
      for (const semu::MemoryStrategy strategy : UniformStrategies(job)) {
        PW_RETURN_IF_ERROR(check_cancelled());
        absl::StatusOr<Candidate> candidate = MakeCandidate(
            job, chain, *memory, strategy, reference, microbatches, costs);
        if (candidate.ok()) {
          candidates.push_back(*std::move(candidate));
        } else if (absl::IsResourceExhausted(candidate.status())) {
          failure = candidate.status();
        } else {
          return candidate.status();
        }
      }
    }
  }
  if (candidates.empty()) return failure;
  const auto by_makespan = [](const auto& a, const auto& b) {
    return a.mean_batch_ns < b.mean_batch_ns;
  };
  std::stable_sort(candidates.begin(), candidates.end(),
                   [&](const Candidate& a, const Candidate& b) {
                     return by_makespan(a.plan, b.plan);
                   });
  std::vector<StaticPlan> plans;
  for (size_t i = 0; i < candidates.size(); ++i) {
    plans.push_back(candidates[i].plan);
    if (i >= kSearched) continue;
    SearchOptions options;
    options.budget.evaluations = kEvaluations;
    options.budget.cancelled = cancelled;
    const absl::StatusOr<SearchResult> found = PortfolioStrategy().Solve(
        BuildProblemGraph(candidates[i].mean), options);
    if (!found.ok() || found->makespan_ns >= plans.back().mean_batch_ns) {
      continue;
    }
    StaticPlan searched = std::move(candidates[i].plan);
    searched.order = ToTurns(found->schedule, searched.chain.virtual_stages);
    searched.mean_batch_ns = found->makespan_ns;
    plans.push_back(std::move(searched));
  }
  PW_RETURN_IF_ERROR(check_cancelled());
  std::stable_sort(plans.begin(), plans.end(), by_makespan);
  return plans;
}

}  // namespace pipeweaver::search
