// A lower bound for pipelines of very unlike groups, by how they fill and
// drain. Part of FlowLowerBound (bound.h).

#ifndef SEARCH_PROBLEM_RAMP_BOUND_H_
#define SEARCH_PROBLEM_RAMP_BOUND_H_

#include <cstdint>
#include <vector>

#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"

namespace pipeweaver::search {

// A rank far down the pipeline waits for a long stage, unless backwards of
// shorter ones give it work meanwhile; those had to get there before, by yet
// shorter ones: a ramp. The end is the same with time reversed: while the last
// long gradient goes back, forwards of shorter ones must be there to run. No
// group is on both ramps; and what is on them is in the way of the long one,
// which must also have the time for its own way there and back.
//
// A group is a component of sweeps (with "after" as edges) in which all lead to
// one last stage, or a sweep of any other component: every F of it runs before
// every B of it. Take a rank b where no backward is split and where a pair's
// least F and least B are one choice's, and a pair p on it, which comes there
// by a way: a list of ranks. Let F of p start at s, and its B end e before the
// end. Lengths of F and B are the least; b is idle when it runs nothing, or a
// stage for longer than that. Let toll(q), for a pair q on b, be its least F
// over the ranks of the way if q came by it, else 0.
//
// By the claim of FlowLowerBound for X = {F of q}, F of any q that came by the
// way starts no earlier than way(q), its own F and transfers, these shortened
// as there, and the tolls of all F that b runs before it. So b is idle before
// it for at least
//     way(q) - excess - (the B that b runs before it)                       (1)
// where excess is the sum of all F on b less their tolls.
//
// Let d be the idle time before s, and A the groups other than that of p of
// which b runs a B before s, and so all F before. Let the pair of a group be
// the one of those that came by the way whose way is longest, and way(g) that;
// or 0 and any pair. Order A by F of these pairs. Each has idle time of at most
// d before it, and the B before it are of groups in A that stand before its
// own. So by (1), for every g in A, and for p with all of A before it,
//     way(g) <= d + excess + (all B on b of those in A before g)            (2)
// If (2) holds in any order, it holds in that of rising way.
//
// The same is true for the end with time reversed: d' the idle time after e, Z
// the groups of which b runs an F after B of p, back for way, B for F and F for
// B. No group is in A and in Z, for its last F is not after its first B.
//
// The makespan is at least all work of b + d + d'. d is at least head, where
// the rank's first stage can start, and d' at least tail. And with L the
// longest path from the start of F to the end of B of p, the makespan is at
// least
//     L + way(p) + back(p) + (F tolls of A) + (B tolls of Z)                (3)
// where the tolls are at least those of the groups, the last in part, that give
// (2) for p the most B or F for their toll. A makespan for which no d, d', A
// and Z fulfil all of this is impossible, and so is any lesser one.
//
// Returns the least makespan not found impossible, to 1/2^14, for some pairs p,
// of the groups that wait longest; or `known` where that is greater. As times,
// it may need all 64 bits. `routes`: RoutesOf(graph).
uint64_t RampLowerBound(const ProblemGraph& graph, const PathBound& path,
                        const std::vector<int32_t>& routes, uint64_t known);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_RAMP_BOUND_H_
