// Least lengths and longest paths; see path_bound.h.

#include "search/problem/path_bound.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "search/problem/problem_graph.h"

namespace pipeweaver::search {
namespace {

LeastLengths LeastOf(const ProblemGraph& graph, int pair) {
  LeastLengths least;
  const auto lower = [](uint64_t value, uint64_t& to) {
    to = std::min(to, value);
  };
  for (const GraphChoice& c : graph.choices_of(pair)) {
    lower(c.forward_ns, least.forward);
    switch (graph.mode[pair]) {
      case PairMode::kForwardOnly:
        lower(0, least.gradient);
        lower(0, least.weight_grad);
        lower(c.forward_ns, least.work);
        break;
      case PairMode::kWhole:
        lower(c.backward_ns, least.gradient);
        lower(0, least.weight_grad);
        lower(c.forward_ns + c.backward_ns, least.work);
        break;
      case PairMode::kSplit:
        lower(c.input_grad_ns, least.gradient);
        lower(c.weight_grad_ns, least.weight_grad);
        lower(c.forward_ns + c.input_grad_ns + c.weight_grad_ns, least.work);
        if (c.has_backward()) {
          lower(c.backward_ns, least.gradient);
          lower(0, least.weight_grad);
          lower(c.forward_ns + c.backward_ns, least.work);
        }
        break;
    }
  }
  return least;
}

}  // namespace

PathBound ComputePathBound(const ProblemGraph& graph) {
  const int n = graph.pairs;
  PathBound result;
  std::vector<LeastLengths>& least = result.least;
  least.resize(n);
  for (int p = 0; p < n; ++p) least[p] = LeastOf(graph, p);

  // Heads: the earliest starts along dependency paths.
  std::vector<uint64_t> forward_head(n, 0), gradient_head(n, 0);
  for (const int p : graph.topological) {
    for (const GraphEdge& edge : graph.producers_of(p)) {
      forward_head[p] = std::max(
          forward_head[p], forward_head[edge.pair] + least[edge.pair].forward +
                               static_cast<uint64_t>(edge.delay_ns));
    }
  }
  for (int i = n - 1; i >= 0; --i) {
    const int p = graph.topological[i];
    if (!graph.has_backward(p)) continue;
    gradient_head[p] = forward_head[p] + least[p].forward;
    for (const GraphEdge& edge : graph.consumers_of(p)) {
      gradient_head[p] =
          std::max(gradient_head[p], gradient_head[edge.pair] +
                                         least[edge.pair].gradient +
                                         static_cast<uint64_t>(edge.delay_ns));
    }
  }
  // Tails: the longest remainders after a stage's end.
  std::vector<uint64_t> forward_tail(n, 0), gradient_tail(n, 0);
  for (const int p : graph.topological) {
    if (!graph.has_backward(p)) continue;
    gradient_tail[p] = least[p].weight_grad;
    for (const GraphEdge& edge : graph.producers_of(p)) {
      if (!graph.has_backward(edge.pair)) continue;
      gradient_tail[p] =
          std::max(gradient_tail[p], gradient_tail[edge.pair] +
                                         least[edge.pair].gradient +
                                         static_cast<uint64_t>(edge.delay_ns));
    }
  }
  for (int i = n - 1; i >= 0; --i) {
    const int p = graph.topological[i];
    if (graph.has_backward(p)) {
      forward_tail[p] = least[p].gradient + gradient_tail[p];
    }
    for (const GraphEdge& edge : graph.consumers_of(p)) {
      forward_tail[p] = std::max(
          forward_tail[p], forward_tail[edge.pair] + least[edge.pair].forward +
                               static_cast<uint64_t>(edge.delay_ns));
    }
  }

  std::vector<uint64_t>&head = result.head, &tail = result.tail;
  std::vector<uint64_t>& work = result.work;
  uint64_t& bound = result.bound;
  head.assign(graph.ranks, PathBound::kUnset);
  tail.assign(graph.ranks, PathBound::kUnset);
  work.assign(graph.ranks, 0);
  for (int p = 0; p < n; ++p) {
    const int r = graph.pair_rank[p];
    // Every path runs through an F, so these are the longest paths.
    bound =
        std::max(bound, forward_head[p] + least[p].forward + forward_tail[p]);
    head[r] = std::min(head[r], forward_head[p]);
    tail[r] = std::min(tail[r], forward_tail[p]);
    work[r] += least[p].work;
    if (!graph.has_backward(p)) continue;
    tail[r] = std::min(tail[r], gradient_tail[p]);
    if (graph.mode[p] == PairMode::kSplit) tail[r] = 0;  // after W
  }
  for (int r = 0; r < graph.ranks; ++r) {
    if (head[r] == PathBound::kUnset) continue;
    bound = std::max(bound, head[r] + work[r] + tail[r]);
  }
  return result;
}

std::vector<uint64_t> ChainsOf(const ProblemGraph& graph,
                               const PathBound& path) {
  std::vector<uint64_t> chain_ns(graph.pairs, 0);
  for (int i = graph.pairs - 1; i >= 0; --i) {
    const int p = graph.topological[i];
    for (const GraphEdge& edge : graph.consumers_of(p)) {
      chain_ns[p] =
          std::max(chain_ns[p], chain_ns[edge.pair] +
                                    2 * static_cast<uint64_t>(edge.delay_ns));
    }
    chain_ns[p] += path.least[p].forward + path.least[p].gradient;
  }
  return chain_ns;
}

std::vector<int32_t> RoutesOf(const ProblemGraph& graph) {
  std::vector<int32_t> routes(graph.pairs, 0);
  // By the route to the stage before and its rank.
  absl::flat_hash_map<std::pair<int32_t, int32_t>, int32_t> numbers;
  for (int p = 1; p < graph.pairs; ++p) {
    if (graph.stage_index(p) == 0) continue;
    const auto [number, inserted] =
        numbers.try_emplace(std::pair(routes[p - 1], graph.pair_rank[p - 1]),
                            static_cast<int32_t>(numbers.size()) + 1);
    routes[p] = number->second;
  }
  return routes;
}

uint64_t TransferAfter(const ProblemGraph& graph, int pair) {
  for (const GraphEdge& edge : graph.consumers_of(pair)) {
    if (edge.pair == pair + 1) return static_cast<uint64_t>(edge.delay_ns);
  }
  return 0;
}

}  // namespace pipeweaver::search
