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

PairMode ModeOf(bool split_backward, bool backward, const ChoiceList& choices) {
  if (!backward) return PairMode::kForwardOnly;
  const bool all_have_weight_grad =
      std::all_of(choices.begin(), choices.end(),
                  [](const Choice& c) { return c.weight_grad_ns > 0; });
  return split_backward && all_have_weight_grad ? PairMode::kSplit
                                                : PairMode::kWhole;
}

// A list of choices that stages share, in sweeps that all have a backward or
// all have none.
struct FlatList {
  int32_t begin = 0;  // in ProblemGraph::choices
  PairMode mode = PairMode::kForwardOnly;
};

// Fills in `flat`, which is as it was made.
void Flatten(const Choice& choice, PairMode mode, GraphChoice& flat) {
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
                      &graph.choice_count}) {
    array->resize(num_pairs);
  }
  graph.mode.resize(num_pairs);
  graph.topological.reserve(num_pairs);
  graph.sweep_first_pair.reserve(problem.sweeps.size() + 1);
  graph.producer_begin.reserve(num_pairs + 1);

  std::vector<int64_t> transfer_ns(num_pairs);
  // By the list, and by whether there is a backward.
  absl::flat_hash_map<std::pair<const Choice*, bool>, FlatList> lists;
  std::vector<std::pair<const ChoiceList*, PairMode>> flattened;
  int32_t num_choices = 0;
  for (int s = 0; s < graph.sweeps; ++s) {
    const Sweep& sweep = problem.sweeps[s];
    graph.sweep_first_pair.push_back(graph.pairs);
    for (const Stage& stage : sweep.stages) {
      const auto [list, inserted] =
          lists.try_emplace(std::pair(stage.choices.data(), sweep.backward));
      if (inserted) {
        list->second = {num_choices, ModeOf(problem.split_backward,
                                            sweep.backward, stage.choices)};
        flattened.emplace_back(&stage.choices, list->second.mode);
        num_choices += static_cast<int32_t>(stage.choices.size());
      }
      const int p = graph.pairs++;
      graph.pair_sweep[p] = s;
      graph.pair_rank[p] = stage.rank;
      graph.mode[p] = list->second.mode;
      graph.choice_begin[p] = list->second.begin;
      graph.choice_count[p] = static_cast<int32_t>(stage.choices.size());
      transfer_ns[p] = stage.transfer_ns;
    }
  }
  graph.sweep_first_pair.push_back(graph.pairs);
  graph.choices.reserve(num_choices);
  for (const auto& [choices, mode] : flattened) {
    for (const Choice& choice : *choices) {
      Flatten(choice, mode, graph.choices.emplace_back());
    }
  }

  // At most one within a sweep, and those of `after`.
  size_t num_edges = num_pairs;
  for (const Sweep& sweep : problem.sweeps) num_edges += sweep.after.size();
  graph.producers.reserve(num_edges);
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
