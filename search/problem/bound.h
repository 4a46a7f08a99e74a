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

// A bound that is never below LowerBound and often tighter: it counts how long
// a rank must idle while the pipeline fills and, where no weight gradients can
// fill the end, while it drains. LowerBound lets the sweep with the shortest
// way to the rank end the idle time there; but short sweeps that reach a rank
// early were in the way of the long ones on the ranks before.
//
// Claim, for a rank b and sweeps that come to it over the same ranks r_0 ..
// r_m-1: let X be any set of F on b, A the other F on b that do not descend
// from X, and let all other tasks on b descend from X. Let x of X start first
// on b, at s. Each a of A that runs on b before s precedes x there. Let k be
// the first rank on x's way on which a precedes x. If k = r_0, a runs on it
// before x does. Otherwise a follows x on the rank before k, so a runs on k
// after x has ended there, its own F there and its transfer: in x's way. Either
// way x waits for a on k for a's length there, in addition to its own stages,
// and to its own transfer or a's F and transfer, whichever is less; for
// different a at one k these waits add up. So
//     s >= sum over r_i of (F of x + transfer) + sum over such a of F of a
// with a's least F over its ranks. On b itself only such a run before s, so the
// makespan is at least the first sum (the least of X), plus all work of b, with
// F of a replaced by its least F over the ranks where that is less. Where tasks
// of b neither descend from X nor came over the same ranks, their whole work
// may fall before s and is taken off. The same holds for the end with time
// reversed, B for F; both ends add up when nothing had to be taken off. The
// bound is the best over sets X = {F on b whose way is at least so long}, or
// that by memory (memory_bound.h), or by how the rank fills and drains
// (ramp_bound.h) where that is better.
//
// O(ranks * edges); of ranks for which that would take long only those are
// looked at whose bound is the highest without it. As times, it may need all 64
// bits.
int64_t FlowLowerBound(const ProblemGraph& graph);

// Both at once, for less than one after the other.
struct LowerBounds {
  int64_t path_ns = 0;  // LowerBound
  int64_t flow_ns = 0;  // FlowLowerBound
};
LowerBounds FindLowerBounds(const ProblemGraph& graph);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_BOUND_H_
