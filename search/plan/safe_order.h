// The safe order: a schedule by a fixed written rule, which every rank can
// compute for itself (twins in other languages are tested on testdata/).
//
// The rule. It reads the problem's structure and bytes, never its durations
// (but for weight_grad_ns being 0 or not, which says whether a stage splits).
//
// 1. Groups. A group is a connected component of the sweeps under `after`: the
//    backbone sweeps of a microbatch with the encoder sweeps that they consume.
//    Groups are numbered by the smallest index of a sweep in them.
// 2. Line of a group. Run the group's forwards alone, each taking one tick. At
//    ticks 0, 1, 2, ...: each rank, rank 0 first, runs one of its forwards not
//    run yet whose inputs were all made in earlier ticks, the one with the
//    smallest (sweep index, stage index); none: it idles. The order of a rank's
//    forwards so found, followed by the reverse of it for the backwards (stages
//    without a backward left out), is the group's line on that rank.
// 3. Backward form. Where a stage does not split, its backward is B. Else it is
//    a fused B if the picked choice has one and fused_backward_bytes <=
//    max(backward_bytes, weight_grad_bytes), else I with W right behind.
// 4. Choices. need(c) of a choice: max(activation_bytes, t) with t =
//    fused_backward_bytes for a fused B, backward_bytes for a B, and
//    max(backward_bytes, weight_grad_bytes) for I and W; activation_bytes alone
//    without a backward. Along a group's forwards on a rank, with held = 0 at
//    the start: of the choices with held + need(c) <= limit take the one with
//    the least activation_bytes, then the least need(c), then the least index;
//    then held += activation_bytes, unless there is no backward. None: the
//    problem has no safe order.
//    Peak of a group on a rank: the most that held + need came to. Hold: held
//    at the end. Extra: peak - hold.
// 5. Flight. Groups are admitted in order of number, and leave when their last
//    stage has ended. A group is admitted when none is in flight, or when fewer
//    than twice as many groups as ranks are and on each rank the sum of hold
//    over the groups in flight and itself, plus the largest extra among them,
//    is within the limit. (1F1B has one a rank; groups differ in length, and
//    what is twice that keeps ranks busy where memory allows.)
// 6. Clock. A forward takes 1 tick, a B, or an I with its W, takes 2; transfers
//    none. At tick 0 and at each tick at which something ends: end it; admit
//    while rule 5 allows; then each idle rank, rank 0 first, looks at the next
//    stage of the line of each group in flight, in order of number, and starts
//    the first backward whose inputs have ended, else the first forward so.
//
// Why it never gets stuck: of the oldest group in flight, the stage that is
// first in the order of rule 2 (forwards by tick, then backwards in reverse)
// among those not started stands next in its rank's line, and what it needs
// precedes it in that order; so it starts when that is over. The group thus
// leaves and makes room; alone, every group fits.
// Why memory holds: on a rank every group runs its own line, so it holds at
// most its hold, and its peak only while one of its own stages runs; one stage
// runs at a time.

#ifndef SEARCH_PLAN_SAFE_ORDER_H_
#define SEARCH_PLAN_SAFE_ORDER_H_

#include "absl/status/statusor.h"
#include "search/problem/problem.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

// The schedule of the rule above: complete, free of deadlock, within memory.
// Succeeds whenever one group at a time fits with all of its forwards held.
//
// REQUIRES: `problem` is well formed.
// Errors: RESOURCE_EXHAUSTED naming rank, bytes and limit. Thread-safe.
absl::StatusOr<Schedule> SafeOrder(const Problem& problem);

}  // namespace pipeweaver::search

#endif  // SEARCH_PLAN_SAFE_ORDER_H_
