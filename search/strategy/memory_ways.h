// Memory choices by a price: every pair run in the way that minimises its
// length plus a price per byte that it holds.

#ifndef SEARCH_STRATEGY_MEMORY_WAYS_H_
#define SEARCH_STRATEGY_MEMORY_WAYS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {

// How long each pair holds its activations, in means over the pairs: at least
// the longest path from its forward through the backward, and some waiting.
std::vector<double> HoldWeights(const ProblemGraph& graph);  // [pair]

// Which way to run a pair at which price. Immutable; thread-safe.
class MemoryPrices {
 public:
  struct Way {
    int32_t choice = 0;
    bool fused = false;  // kSplit: B in place of I and W
  };

  explicit MemoryPrices(const ProblemGraph& graph);

  // The way of least length + ns_per_byte * activation bytes; ties: less
  // memory, then the first.
  Way At(int pair, double ns_per_byte) const {
    int32_t at = hull_begin_[pair];
    while (hulls_[at].gives_way_at <= ns_per_byte) ++at;
    return hulls_[at].way;
  }

  // All pairs at one price, times `weights` [pair].
  Ways AllAt(absl::Span<const double> weights, double ns_per_byte) const;

  // Prices, before weights, at which the way of some typical pair changes, from
  // 0 (fastest) on, ending where all are at their leanest; at most `most`.
  std::vector<double> Typical(absl::Span<const double> weights, int most) const;

 private:
  // Of a lower convex hull of (bytes, length), from fast to lean.
  struct Corner {
    double gives_way_at = 0;  // ns per byte; infinite at the leanest
    Way way;
  };

  std::vector<Corner> hulls_;
  std::vector<int32_t> hull_begin_;  // [pair]; alike pairs share theirs
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_MEMORY_WAYS_H_
