// A lower bound for problems with one very long chain: the sweeps of one large
// microbatch there and back. Part of FlowLowerBound (bound.h).

#ifndef SEARCH_PROBLEM_CHAIN_BOUND_H_
#define SEARCH_PROBLEM_CHAIN_BOUND_H_

#include <cstdint>
#include <vector>

#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"

namespace pipeweaver::search {

// A rank far down the pipeline waits for a long stage, unless other sweeps give
// it work meanwhile. Those sweeps' own stages are in the long chain's way. A
// chain nearly as long as the makespan cannot wait for many of them.
//
// Claim, for a pair p with a backward, on a rank b where no backward is split:
// let F of p start at s, and its B end e before the end. `way` is what F of p
// needs to reach b: its sweep's F on the ranks before, and transfers, these as
// in the claim of FlowLowerBound; `back` the same for B, from b on. L is the
// longest path from the start of F to the end of B of p, W all work of b. Then
//     makespan >= s + (what b runs between s and e before the end) + e   (1)
//     makespan >= s + L + e                                              (2)
// Before s, b runs no task that descends from F of p. Of those that it runs
// before s and that came over the same ranks as p, each F is in the way of F of
// p, by the same claim for X = {F of p}, for its least length over those ranks:
// its toll. So s is at least way + tolls, and at least head + what b runs
// before s; with time reversed the same holds for e and B. A pair of which F
// and B run before s adds its work to the second of these sums, or else takes
// its work less its toll off (1); so
//     makespan >= W + max(head, way - fill) + max(tail, back - fill')    (1')
//     makespan >= L + way + tolls + back + tolls'                        (2')
// where fill is the sum of those pairs' work less tolls. A pair of which only F
// may run before s, since its B descends from F of p, fills less, by its least
// B; a pair that came over other ranks has no toll. Pairs that fill most for
// their toll do best by both; with those, the last in part, for which (1') and
// (2') are equal, this value is a bound whatever runs where.
//
// Returns the best of these over some pairs p, of each of the sweeps with the
// longest chains one, or `known` where none is above it. As times, it may need
// all 64 bits. `routes`: RoutesOf(graph).
uint64_t ChainLowerBound(const ProblemGraph& graph, const PathBound& path,
                         const std::vector<int32_t>& routes, uint64_t known);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_CHAIN_BOUND_H_
