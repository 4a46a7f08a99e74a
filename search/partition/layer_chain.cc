// Cuts, chunks and orders of a chain.

#include "search/partition/layer_chain.h"

#include <algorithm>
#include <numeric>
#include <optional>

#include "search/partition/layer_partition.h"
#include "search/partition/layout_planner.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/cost/weight_memory.h"
#include "semu/model/job_proto.h"
#include "semu/model/layer_size.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Job;

// Of a rank's memory, for weights and what belongs to them.
constexpr double kWeightShares[] = {0.8, 0.65, 0.5, 0.35};

std::vector<ChainTurn> OneForwardOneBackward(int ranks, int rank,
                                             int microbatches,
                                             int virtual_stages) {
  const int total =
      virtual_stages *
      FilledMicrobatches(ChainRule::k1f1b, ranks, microbatches, virtual_stages);
  const auto turn = [&](StageKind kind, int k) {
    if (virtual_stages == 1) return ChainTurn{kind, k, 0};
    const int in_group = k % (ranks * virtual_stages);
    const int stage = in_group / ranks;
    return ChainTurn{
        kind, k / (ranks * virtual_stages) * ranks + k % ranks,
        kind == StageKind::kForward ? stage : virtual_stages - 1 - stage};
  };
  const int ahead = ranks - 1 - rank;
  const int warm_up = std::min(
      total,
      virtual_stages == 1 ? ahead : 2 * ahead + (virtual_stages - 1) * ranks);
  std::vector<ChainTurn> order;
  order.reserve(2 * microbatches * virtual_stages);
  const auto add = [&](StageKind kind, int k) {
    const ChainTurn added = turn(kind, k);
    if (added.microbatch < microbatches) order.push_back(added);
  };
  for (int k = 0; k < warm_up; ++k) add(StageKind::kForward, k);
  for (int k = warm_up; k < total; ++k) {
    add(StageKind::kForward, k);
    add(StageKind::kBackward, k - warm_up);
  }
  for (int k = total - warm_up; k < total; ++k) add(StageKind::kBackward, k);
  return order;
}

std::vector<ChainTurn> Gpipe(int microbatches) {
  std::vector<ChainTurn> order;
  order.reserve(2 * static_cast<size_t>(microbatches));
  for (int m = 0; m < microbatches; ++m) {
    order.push_back({StageKind::kForward, m, 0});
  }
  for (int m = 0; m < microbatches; ++m) {
    order.push_back({StageKind::kBackward, m, 0});
  }
  return order;
}

std::vector<ChainTurn> ZeroBubbleH1(int ranks, int rank, int microbatches) {
  std::vector<ChainTurn> order;
  int weights = 0;
  for (const ChainTurn& turn :
       OneForwardOneBackward(ranks, rank, microbatches, 1)) {
    if (turn.kind == StageKind::kForward) {
      order.push_back(turn);
      continue;
    }
    order.push_back({StageKind::kInputGrad, turn.microbatch, 0});
    if (turn.microbatch >= rank) {
      order.push_back({StageKind::kWeightGrad, weights++, 0});
    }
  }
  while (weights < microbatches) {
    order.push_back({StageKind::kWeightGrad, weights++, 0});
  }
  return order;
}

std::vector<ChainTurn> ZeroBubbleV(int ranks, int rank, int microbatches) {
  const int n = FilledMicrobatches(ChainRule::kZeroBubbleV, ranks, microbatches,
                                   /*virtual_stages=*/2);
  std::vector<ChainTurn> order;
  const auto add = [&](StageKind kind, int microbatch, int v) {
    if (microbatch < microbatches) order.push_back({kind, microbatch, v});
  };
  int forwards[2] = {}, gradients[2] = {}, weights[2] = {};
  const auto forward = [&](int v) {
    add(StageKind::kForward, forwards[v]++, v);
  };
  const auto gradient = [&](int v) {
    add(StageKind::kInputGrad, gradients[v]++, v);
  };
  const auto weight = [&](int v) {
    add(StageKind::kWeightGrad, weights[v]++, v);
  };
  // Warm-up: the way down fills the ranks, then forwards of both ways in turn.
  for (int i = 0; i < 2 * (ranks - rank) - 1; ++i) forward(0);
  for (int i = 0; i < rank; ++i) {
    forward(1);
    forward(0);
  }
  for (int i = 0; i < ranks - rank; ++i) {
    forward(1);
    gradient(1);
    weight(1);
  }
  while (forwards[1] < forwards[0] || forwards[0] < n) {
    if (forwards[0] < n) forward(0);
    gradient(0);
    weight(0);
    forward(1);
    gradient(1);
    weight(1);
  }
  // Drain: weight gradients where input gradients are on their way.
  for (int i = 0; i < rank; ++i) {
    gradient(0);
    gradient(1);
  }
  for (int i = 0; i < ranks - rank; ++i) {
    gradient(0);
    weight(0);
  }
  while (weights[1] < n) weight(1);
  while (weights[0] < n) weight(0);
  return order;
}

}  // namespace

absl::StatusOr<ChainWeights> WeighChain(const Job& job,
                                        absl::Span<const int> modules,
                                        const semu::Batch& reference,
                                        const semu::CostModel& costs) {
  PW_ASSIGN_OR_RETURN(const LayerTimes times,
                      MeanLayerTimes(job, reference, costs));
  ChainWeights weights;
  for (const int m : modules) {
    for (const semu::LayerGroup& group : job.modules[m].layers) {
      weights.parameters.insert(weights.parameters.end(), group.count,
                                semu::ParameterCount(group.layer));
      weights.bytes.insert(
          weights.bytes.end(), group.count,
          semu::WeightMemoryOf(job, group.layer, !job.modules[m].frozen)
              .Total());
    }
    weights.time_ns.insert(weights.time_ns.end(), times[m].begin(),
                           times[m].end());
  }
  return weights;
}

std::vector<std::vector<int>> CutsByTime(const ChainWeights& weights, int ranks,
                                         int chunks_per_rank,
                                         int64_t memory_bytes) {
  const int chunks = ranks * chunks_per_rank;
  std::vector<std::vector<int>> cuts = {
      PartitionLayers(weights.time_ns, chunks)};
  for (const double share : kWeightShares) {
    const std::optional<std::vector<int>> cut = PartitionLayersWithin(
        weights.time_ns, chunks, weights.bytes,
        static_cast<int64_t>(share * static_cast<double>(memory_bytes)) /
            chunks_per_rank);
    if (cut.has_value() && *cut != cuts.back()) cuts.push_back(*cut);
  }
  return cuts;
}

std::vector<semu::MemoryStrategy> UniformStrategies(const Job& job) {
  std::vector<semu::MemoryStrategy> strategies = {semu::MemoryStrategy::kKeep};
  if (job.executor.selective_recompute) {
    strategies.push_back(semu::MemoryStrategy::kSelectiveRecompute);
  }
  if (job.executor.full_recompute) {
    strategies.push_back(semu::MemoryStrategy::kFullRecompute);
  }
  return strategies;
}

Chain MakeChain(const Job& job, absl::Span<const int> modules,
                absl::Span<const int> chunk_lengths, bool v_shaped) {
  const int ranks = job.parallelism.pipeline_parallel;
  PW_CHECK(chunk_lengths.size() % ranks == 0);
  Chain chain;
  chain.virtual_stages = static_cast<int>(chunk_lengths.size()) / ranks;
  chain.layout.modules.resize(job.modules.size());
  chain.virtual_stage.resize(job.modules.size());
  for (semu::ModuleLayout& module : chain.layout.modules) {
    module.sub_microbatch_tokens = semu::kMaxMicrobatchTokens;
  }
  int chunk = 0;
  int left = chunk_lengths[0];
  for (const int m : modules) {
    semu::ModuleLayout& module = chain.layout.modules[m];
    std::vector<int>& virtual_stage = chain.virtual_stage[m];
    const int layers = job.modules[m].NumLayers();
    int next = 0;
    while (next < layers) {
      while (left == 0) left = chunk_lengths[++chunk];
      const int taken = std::min(left, layers - next);
      const int pass = chunk / ranks;
      if (virtual_stage.empty() || virtual_stage.back() != pass) {
        virtual_stage.push_back(pass);
        module.segments.emplace_back();
      }
      const bool descends = v_shaped && pass % 2 == 1;
      const int rank = descends ? ranks - 1 - chunk % ranks : chunk % ranks;
      module.segments.back().chunks.push_back({rank, next, taken});
      next += taken;
      left -= taken;
    }
  }
  return chain;
}

int FilledMicrobatches(ChainRule rule, int ranks, int microbatches,
                       int virtual_stages) {
  if (rule == ChainRule::kZeroBubbleV) {
    return std::max(2 * ranks - 1, microbatches);
  }
  if (virtual_stages == 1) return microbatches;
  return (microbatches + ranks - 1) / ranks * ranks;
}

std::vector<ChainTurn> ChainOrder(ChainRule rule, int ranks, int rank,
                                  int microbatches, int virtual_stages) {
  switch (rule) {
    case ChainRule::k1f1b:
      return OneForwardOneBackward(ranks, rank, microbatches, virtual_stages);
    case ChainRule::kGpipe:
      PW_CHECK(virtual_stages == 1);
      return Gpipe(microbatches);
    case ChainRule::kZeroBubbleH1:
      PW_CHECK(virtual_stages == 1);
      return ZeroBubbleH1(ranks, rank, microbatches);
    case ChainRule::kZeroBubbleV:
      PW_CHECK(virtual_stages == 2);
      return ZeroBubbleV(ranks, rank, microbatches);
  }
  PW_CHECK(false && "unknown rule");
}

Schedule ChainSchedule(const Job& job, const Chain& chain,
                       const StepProblem& step, const ProblemGraph& graph,
                       absl::Span<const std::vector<ChainTurn>> orders) {
  const int ranks = job.parallelism.pipeline_parallel;
  const Problem& problem = step.problem;
  std::vector<int> position(job.modules.size());
  const std::vector<int> order = semu::TopologicalOrder(job);
  int microbatches = 0;
  for (size_t i = 0; i < order.size(); ++i) {
    position[order[i]] = static_cast<int>(i);
  }
  for (const Sweep& sweep : problem.sweeps) {
    microbatches = std::max(microbatches, sweep.microbatch + 1);
  }
  // [rank][virtual stage][microbatch]: forwards, in chain order.
  using Stages = std::vector<ScheduledStage>;
  std::vector<std::vector<std::vector<Stages>>> turns(
      ranks, std::vector<std::vector<Stages>>(
                 chain.virtual_stages, std::vector<Stages>(microbatches)));
  std::vector<int> sweeps(problem.sweeps.size());
  std::iota(sweeps.begin(), sweeps.end(), 0);
  const auto module_of = [&step](int sweep) {
    return step.sub_microbatches[step.sweeps[sweep].sub_microbatch].module;
  };
  std::stable_sort(sweeps.begin(), sweeps.end(), [&](int a, int b) {
    return position[module_of(a)] < position[module_of(b)];
  });
  for (const int i : sweeps) {
    const SweepOrigin& origin = step.sweeps[i];
    const int module = module_of(i);
    const int virtual_stage = chain.virtual_stage[module][origin.segment];
    if (virtual_stage < 0) continue;
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
    std::vector<ScheduledStage>& out = schedule.ranks[r];
    for (const ChainTurn& turn : orders[r]) {
      if (turn.microbatch >= microbatches) continue;
      const Stages& stages = turns[r][turn.virtual_stage][turn.microbatch];
      if (turn.kind == StageKind::kForward) {
        out.insert(out.end(), stages.begin(), stages.end());
        continue;
      }
      for (auto stage = stages.rbegin(); stage != stages.rend(); ++stage) {
        const PairMode mode =
            graph.mode[graph.sweep_first_pair[stage->sweep] + stage->stage];
        if (mode == PairMode::kForwardOnly) continue;
        StageKind kind = turn.kind;
        if (mode == PairMode::kWhole) {
          if (kind == StageKind::kWeightGrad) continue;
          kind = StageKind::kBackward;
        }
        out.push_back(*stage);
        out.back().kind = kind;
      }
    }
  }
  return schedule;
}

}  // namespace pipeweaver::search
