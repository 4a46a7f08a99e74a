// Lower bounds of a problem's makespan.

#ifndef SEARCH_PROBLEM_BOUND_H_
#define SEARCH_PROBLEM_BOUND_H_

#include <cstdint>

#include "search/problem/problem_graph.h"

namespace pipeweaver::search {

// The bound of the problem format, memory ignored: the larger of the longest
// dependency path, each stage at its least duration over the choices, and over
// ranks the least head + the pairs' least work + the least tail. O(edges).
// As times, it may need all 64 bits (timing.h).
int64_t LowerBound(const ProblemGraph& graph);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_BOUND_H_
