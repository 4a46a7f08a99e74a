// Lower convex hulls of time over memory; see memory_ways.h.

#include "search/strategy/memory_ways.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
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

MemoryPrices::MemoryPrices(const ProblemGraph& graph) {
  hull_begin_.reserve(graph.pairs);
  std::vector<int32_t> known(graph.choices.size(), -1);  // by choice_begin
  std::vector<std::pair<Option, Way>> options;
  for (int p = 0; p < graph.pairs; ++p) {
    int32_t& begin = known[graph.choice_begin[p]];
    if (begin < 0) {
      begin = static_cast<int32_t>(hulls_.size());
      options.clear();
      const auto choices = graph.choices_of(p);
      for (int c = 0; c < choices.size(); ++c) {
        ForEachOption(choices[c], graph.mode[p], [&](const Option& option) {
          options.push_back({option, {c, option.fused}});
        });
      }
      const std::pair<Option, Way>* at = &options[0];
      for (const auto& o : options) {
        if (o.first.length_ns < at->first.length_ns ||
            (o.first.length_ns == at->first.length_ns &&
             o.first.bytes < at->first.bytes)) {
          at = &o;
        }
      }
      while (true) {
        const std::pair<Option, Way>* next = nullptr;
        double least = std::numeric_limits<double>::infinity();
        for (const auto& o : options) {
          if (o.first.bytes >= at->first.bytes) continue;
          const double price =
              static_cast<double>(o.first.length_ns - at->first.length_ns) /
              static_cast<double>(at->first.bytes - o.first.bytes);
          if (next == nullptr || price < least ||
              (price == least && o.first.bytes < next->first.bytes)) {
            next = &o;
            least = price;
          }
        }
        hulls_.push_back({least, at->second});
        if (next == nullptr) break;
        at = next;
      }
    }
    hull_begin_.push_back(begin);
  }
}

Ways MemoryPrices::AllAt(absl::Span<const double> weights,
                         double ns_per_byte) const {
  Ways ways;
  ways.choice.reserve(hull_begin_.size());
  ways.fused.reserve(hull_begin_.size());
  for (size_t p = 0; p < hull_begin_.size(); ++p) {
    const Way way = At(static_cast<int>(p), ns_per_byte * weights[p]);
    ways.choice.push_back(way.choice);
    ways.fused.push_back(way.fused ? Ways::kFused : Ways::kApart);
  }
  return ways;
}

std::vector<double> MemoryPrices::Typical(absl::Span<const double> weights,
                                          int most) const {
  std::vector<double> prices;
  const size_t step = 1 + hull_begin_.size() / kMostSampled;
  for (size_t p = 0; p < hull_begin_.size(); p += step) {
    if (weights[p] <= 0) continue;
    for (int32_t at = hull_begin_[p]; std::isfinite(hulls_[at].gives_way_at);
         ++at) {
      prices.push_back(hulls_[at].gives_way_at / weights[p]);
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
