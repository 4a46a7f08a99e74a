// Flattens a problem into arrays; see problem_graph.h.

#include "search/problem/problem_graph.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "search/problem/problem.h"
#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

PairMode ModeOf(const Problem& problem, const Sweep& sweep,
                const Stage& stage) {
  if (!sweep.backward) return PairMode::kForwardOnly;
  const bool all_have_weight_grad =
      std::all_of(stage.choices.begin(), stage.choices.end(),
                  [](const Choice& c) { return c.weight_grad_ns > 0; });
  return problem.split_backward && all_have_weight_grad ? PairMode::kSplit
                                                        : PairMode::kWhole;
}

GraphChoice Flatten(const Choice& choice, PairMode mode) {
  GraphChoice flat;
  flat.forward_ns = choice.forward_ns;
  flat.activation_bytes = choice.activation_bytes;
  switch (mode) {
    case PairMode::kForwardOnly:
      flat.backward_ns = GraphChoice::kNone;
      break;
    case PairMode::kWhole:
      flat.backward_ns = choice.input_grad_ns + choice.weight_grad_ns;
      flat.backward_bytes = choice.backward_bytes;
      break;
    case PairMode::kSplit:
      flat.input_grad_ns = choice.input_grad_ns;
      flat.weight_grad_ns = choice.weight_grad_ns;
      flat.input_grad_bytes = choice.backward_bytes;
      flat.weight_grad_bytes = choice.weight_grad_bytes;
      flat.backward_ns = choice.fused_backward_ns.value_or(GraphChoice::kNone);
      flat.backward_bytes = choice.fused_backward_bytes;
      break;
  }
  return flat;
}

}  // namespace

ProblemGraph BuildProblemGraph(const Problem& problem) {
  ProblemGraph graph;
  graph.ranks = problem.ranks;
  graph.sweeps = static_cast<int>(problem.sweeps.size());
  graph.limit_bytes = problem.memory_limit_bytes;

  size_t num_pairs = 0;
  for (const Sweep& sweep : problem.sweeps) num_pairs += sweep.stages.size();
  for (auto* array : {&graph.pair_sweep, &graph.pair_rank, &graph.choice_begin,
                      &graph.choice_count, &graph.topological}) {
    array->reserve(num_pairs);
  }
  graph.mode.reserve(num_pairs);
  graph.sweep_first_pair.reserve(problem.sweeps.size() + 1);
  graph.producer_begin.reserve(num_pairs + 1);

  std::vector<int64_t> transfer_ns;
  transfer_ns.reserve(num_pairs);
  // Where lists that stages share stand, by the list and by mode.
  absl::flat_hash_map<std::pair<const Choice*, PairMode>, int32_t> begins;
  for (int s = 0; s < graph.sweeps; ++s) {
    const Sweep& sweep = problem.sweeps[s];
    graph.sweep_first_pair.push_back(graph.pairs);
    for (const Stage& stage : sweep.stages) {
      graph.pair_sweep.push_back(s);
      graph.pair_rank.push_back(stage.rank);
      graph.mode.push_back(ModeOf(problem, sweep, stage));
      const auto [begin, inserted] =
          begins.try_emplace(std::pair(stage.choices.data(), graph.mode.back()),
                             static_cast<int32_t>(graph.choices.size()));
      if (inserted) {
        for (const Choice& choice : stage.choices) {
          graph.choices.push_back(Flatten(choice, graph.mode.back()));
        }
      }
      graph.choice_begin.push_back(begin->second);
      graph.choice_count.push_back(static_cast<int32_t>(stage.choices.size()));
      transfer_ns.push_back(stage.transfer_ns);
      ++graph.pairs;
    }
  }
  graph.sweep_first_pair.push_back(graph.pairs);

  std::vector<int32_t> consumer_count(graph.pairs, 0);
  const auto add_producer = [&](int from, int to) {
    const bool same_rank = graph.pair_rank[from] == graph.pair_rank[to];
    graph.producers.push_back(
        {from, same_rank ? int64_t{0} : transfer_ns[from]});
    ++consumer_count[from];
  };
  for (int s = 0; s < graph.sweeps; ++s) {
    const int first = graph.sweep_first_pair[s];
    for (int p = first; p < graph.sweep_first_pair[s + 1]; ++p) {
      graph.producer_begin.push_back(
          static_cast<int32_t>(graph.producers.size()));
      if (p > first) {
        add_producer(p - 1, p);
      } else {
        for (const int before : problem.sweeps[s].after) {
          add_producer(graph.sweep_first_pair[before + 1] - 1, p);
        }
      }
    }
  }
  graph.producer_begin.push_back(static_cast<int32_t>(graph.producers.size()));

  graph.consumer_begin.assign(graph.pairs + 1, 0);
  for (int p = 0; p < graph.pairs; ++p) {
    graph.consumer_begin[p + 1] = graph.consumer_begin[p] + consumer_count[p];
  }
  graph.consumers.resize(graph.producers.size());
  std::vector<int32_t> fill(graph.consumer_begin.begin(),
                            graph.consumer_begin.end() - 1);
  for (int p = 0; p < graph.pairs; ++p) {
    for (const GraphEdge& edge : graph.producers_of(p)) {
      graph.consumers[fill[edge.pair]++] = {p, edge.delay_ns};
    }
  }

  std::vector<int32_t> waits(graph.pairs);
  for (int p = 0; p < graph.pairs; ++p) {
    waits[p] = graph.producers_of(p).size();
    if (waits[p] == 0) graph.topological.push_back(p);
  }
  for (size_t i = 0; i < graph.topological.size(); ++i) {
    for (const GraphEdge& edge : graph.consumers_of(graph.topological[i])) {
      if (--waits[edge.pair] == 0) graph.topological.push_back(edge.pair);
    }
  }
  PW_CHECK(static_cast<int>(graph.topological.size()) == graph.pairs);
  return graph;
}

}  // namespace pipeweaver::search
