// Memory choices by a price: every pair run in the way that minimises its
// length plus a price per byte that it holds.

#ifndef SEARCH_STRATEGY_MEMORY_WAYS_H_
#define SEARCH_STRATEGY_MEMORY_WAYS_H_

#include <vector>

#include "absl/types/span.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {

// How long each pair holds its activations, in means over the pairs: at least
// the longest path from its forward through the backward, and some waiting.
std::vector<double> HoldWeights(const ProblemGraph& graph);  // [pair]

// For each pair the choice, and B or I and W, of least
// length + ns_per_byte * weight * activation bytes; ties: less memory, then the
// first. `weights` is [pair].
Ways WaysAtPrice(const ProblemGraph& graph, absl::Span<const double> weights,
                 double ns_per_byte);

// Prices at which the choice of some typical pair changes, from 0 (fastest) on,
// ending where every pair is at its leanest; at most `most` of them.
std::vector<double> TypicalPrices(const ProblemGraph& graph,
                                  absl::Span<const double> weights, int most);

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_MEMORY_WAYS_H_
