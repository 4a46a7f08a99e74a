// Uniform memory choices: every pair run in the way that minimises its length
// plus a price per byte that it holds.

#ifndef SEARCH_STRATEGY_MEMORY_WAYS_H_
#define SEARCH_STRATEGY_MEMORY_WAYS_H_

#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {

// For each pair the choice, and B or I and W, of least
// length + ns_per_byte * activation bytes; ties: less memory, then the first.
Ways WaysAtPrice(const ProblemGraph& graph, double ns_per_byte);

// Prices at which the choice of some typical pair changes, from 0 (fastest) on,
// ending where every pair is at its leanest; at most `most` of them.
std::vector<double> TypicalPrices(const ProblemGraph& graph, int most);

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_MEMORY_WAYS_H_
