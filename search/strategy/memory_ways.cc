// Uniform memory choices; see memory_ways.h.

#include "search/strategy/memory_ways.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {
namespace {

// Pairs looked at for typical prices.
constexpr int kMostSampled = 512;
// Time that activations wait besides their dependencies, in mean holds.
constexpr double kWaitShare = 0.3;

struct Option {
  int64_t length_ns = 0;
  int64_t bytes = 0;
  bool fused = false;
};

// The ways of a choice: in one piece, and split, as far as the mode allows.
template <typename Visitor>
void ForEachOption(const GraphChoice& choice, PairMode mode,
                   const Visitor& visit) {
  if (mode == PairMode::kForwardOnly) {
    visit(Option{choice.forward_ns, choice.activation_bytes, false});
    return;
  }
  if (mode == PairMode::kWhole || choice.has_backward()) {
    visit(Option{choice.forward_ns + choice.backward_ns,
                 choice.activation_bytes, mode == PairMode::kSplit});
  }
  if (mode == PairMode::kSplit) {
    visit(
        Option{choice.forward_ns + choice.input_grad_ns + choice.weight_grad_ns,
               choice.activation_bytes, false});
  }
}

}  // namespace

std::vector<double> HoldWeights(const ProblemGraph& graph) {
  std::vector<double> weights(graph.pairs, 0);
  double sum = 0;
  int count = 0;
  for (int i = graph.pairs - 1; i >= 0; --i) {
    const int p = graph.topological[i];
    if (!graph.has_backward(p)) continue;
    for (const GraphEdge& edge : graph.consumers_of(p)) {
      weights[p] =
          std::max(weights[p],
                   weights[edge.pair] + 2 * static_cast<double>(edge.delay_ns));
    }
    const GraphChoice& choice = graph.choices_of(p)[0];
    weights[p] += static_cast<double>(choice.forward_ns) +
                  static_cast<double>(graph.mode[p] == PairMode::kSplit
                                          ? choice.input_grad_ns
                                          : choice.backward_ns);
    sum += weights[p];
    ++count;
  }
  if (count == 0 || sum == 0) return std::vector<double>(graph.pairs, 1);
  const double wait = kWaitShare * sum / count;
  for (double& weight : weights) weight = (weight + wait) * count / sum;
  return weights;
}

Ways WaysAtPrice(const ProblemGraph& graph, absl::Span<const double> weights,
                 double ns_per_byte) {
  Ways ways;
  ways.choice.assign(graph.pairs, 0);
  ways.fused.assign(graph.pairs, 0);
  for (int p = 0; p < graph.pairs; ++p) {
    const auto choices = graph.choices_of(p);
    bool first = true;
    double best_cost = 0;
    int64_t best_bytes = 0;
    for (int c = 0; c < choices.size(); ++c) {
      ForEachOption(choices[c], graph.mode[p], [&](const Option& option) {
        const double cost =
            static_cast<double>(option.length_ns) +
            ns_per_byte * weights[p] * static_cast<double>(option.bytes);
        if (first || cost < best_cost ||
            (cost == best_cost && option.bytes < best_bytes)) {
          first = false;
          best_cost = cost;
          best_bytes = option.bytes;
          ways.choice[p] = c;
          ways.fused[p] = option.fused ? 1 : 0;
        }
      });
    }
  }
  return ways;
}

std::vector<double> TypicalPrices(const ProblemGraph& graph,
                                  absl::Span<const double> weights, int most) {
  // Breakpoints of the lower convex hulls of (bytes, length).
  std::vector<double> prices;
  std::vector<Option> options;
  const int step = 1 + graph.pairs / kMostSampled;
  for (int p = 0; p < graph.pairs; p += step) {
    options.clear();
    for (const GraphChoice& choice : graph.choices_of(p)) {
      ForEachOption(choice, graph.mode[p],
                    [&](const Option& option) { options.push_back(option); });
    }
    if (options.size() < 2) continue;
    Option at = options[0];
    for (const Option& o : options) {
      if (o.length_ns < at.length_ns ||
          (o.length_ns == at.length_ns && o.bytes < at.bytes)) {
        at = o;
      }
    }
    while (true) {
      const Option* next = nullptr;
      double least = 0;
      for (const Option& o : options) {
        if (o.bytes >= at.bytes) continue;
        const double price = static_cast<double>(o.length_ns - at.length_ns) /
                             static_cast<double>(at.bytes - o.bytes);
        if (next == nullptr || price < least) {
          next = &o;
          least = price;
        }
      }
      if (next == nullptr) break;
      if (weights[p] > 0) prices.push_back(least / weights[p]);
      at = *next;
    }
  }
  std::sort(prices.begin(), prices.end());
  std::vector<double> picked = {0};
  if (prices.empty()) return picked;
  for (int i = 1; i < most; ++i) {
    const size_t at = std::min(
        prices.size() - 1, prices.size() * i / static_cast<size_t>(most - 1));
    const double price = prices[at] * (1 + 1e-9);
    if (price > picked.back()) picked.push_back(price);
  }
  return picked;
}

}  // namespace pipeweaver::search
