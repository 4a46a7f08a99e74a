// The bound by memory; see memory_bound.h.

#include "search/problem/memory_bound.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "absl/numeric/int128.h"
#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"

namespace pipeweaver::search {
namespace {

// Of all pairs: some 20 ms.
constexpr int64_t kMostChoices = 50'000;
constexpr uint64_t kSteps = 512;  // of k
// More counts for no more, so that no sum overflows.
constexpr uint64_t kMost = uint64_t{1} << 62;

}  // namespace

MemoryBound::MemoryBound(const ProblemGraph& graph, const PathBound& path)
    : graph_(graph),
      path_(path),
      chain_ns_(ChainsOf(graph, path)),
      pairs_on_rank_(graph.ranks) {
  for (int p = 0; p < graph.pairs; ++p) {
    pairs_on_rank_[graph.pair_rank[p]].push_back(p);
  }
  few_choices_ =
      std::accumulate(graph.choice_count.begin(), graph.choice_count.end(),
                      int64_t{0}) <= kMostChoices;
}

template <typename Add>
void MemoryBound::ForEachWay(int pair, Add add) const {
  const auto limit =
      static_cast<uint64_t>(graph_.limit_bytes[graph_.pair_rank[pair]]);
  const auto held = [](int64_t bytes, uint64_t ns) {
    return absl::uint128(bytes) * ns;
  };
  const auto by_limit = [limit](absl::uint128 product) {
    return static_cast<uint64_t>(
        std::min<absl::uint128>(product / limit, kMost));
  };
  const LeastLengths& least = path_.least[pair];
  const uint64_t inside = chain_ns_[pair] - least.forward - least.gradient;
  for (const GraphChoice& c : graph_.choices_of(pair)) {
    const auto forward = static_cast<uint64_t>(c.forward_ns);
    if (!graph_.has_backward(pair)) {
      add(Way{.forward = forward,
              .held = by_limit(held(c.activation_bytes, forward))});
      continue;
    }
    const absl::uint128 until_backward =
        held(c.activation_bytes, forward + inside);
    if (c.has_backward()) {
      const auto backward = static_cast<uint64_t>(c.backward_ns);
      add(Way{
          .forward = forward,
          .backward = backward,
          .held = by_limit(until_backward + held(c.backward_bytes, backward))});
    }
    if (graph_.mode[pair] == PairMode::kSplit) {
      const auto input_grad = static_cast<uint64_t>(c.input_grad_ns);
      const auto weight_grad = static_cast<uint64_t>(c.weight_grad_ns);
      add(Way{.forward = forward,
              .backward = input_grad,
              .weight_grad = weight_grad,
              .held = by_limit(until_backward +
                               held(c.input_grad_bytes, input_grad) +
                               held(c.weight_grad_bytes, weight_grad))});
    }
  }
}

bool MemoryBound::Matters(int rank, uint64_t known_ns) const {
  if (!few_choices_ || graph_.limit_bytes[rank] == 0) return false;
  absl::uint128 most = path_.head[rank] + path_.tail[rank];
  for (const int p : pairs_on_rank_[rank]) {
    uint64_t most_held = 0;
    ForEachWay(p, [&most_held](const Way& way) {
      most_held = std::max(most_held, way.held);
    });
    most += most_held;
  }
  return most > known_ns;
}

uint64_t MemoryBound::Compute(int rank, const RankEnd& start,
                              const RankEnd& end) const {
  const auto counted = [](const RankEnd& at, size_t i, uint64_t ns) {
    return at.most_ns.empty() ? ns : std::min(ns, at.most_ns[i]);
  };
  struct Part {
    uint64_t time = 0, held = 0;
  };
  const std::vector<int32_t>& pairs = pairs_on_rank_[rank];
  std::vector<Part> parts;
  std::vector<size_t> parts_end;  // [pair of the rank]
  for (size_t i = 0; i < pairs.size(); ++i) {
    ForEachWay(pairs[i], [&](const Way& way) {
      parts.push_back({counted(start, i, way.forward) +
                           counted(end, i, way.backward) + way.weight_grad,
                       way.held});
    });
    parts_end.push_back(parts.size());
  }
  const auto bound = [&](uint64_t k) {
    const auto weighed = [k](uint64_t time, uint64_t held) {
      return absl::uint128(time) * (kSteps - k) + absl::uint128(held) * k;
    };
    absl::uint128 sum = weighed(start.idle_ns + end.idle_ns,
                                path_.head[rank] + path_.tail[rank]);
    size_t i = 0;
    for (const size_t last : parts_end) {
      absl::uint128 least = weighed(parts[i].time, parts[i].held);
      for (++i; i < last; ++i) {
        least = std::min(least, weighed(parts[i].time, parts[i].held));
      }
      sum += least;
    }
    return sum;
  };
  uint64_t first = 0, last = kSteps;
  while (first < last) {
    const uint64_t middle = first + (last - first) / 2;
    if (bound(middle) < bound(middle + 1)) {
      first = middle + 1;
    } else {
      last = middle;
    }
  }
  return static_cast<uint64_t>(
      std::min<absl::uint128>((bound(first) + kSteps - 1) / kSteps, kMost));
}

}  // namespace pipeweaver::search
