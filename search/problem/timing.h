// Exact timing of a given order: every rank runs its list strictly in order, a
// stage starts as soon as its rank is free and its inputs have arrived. No
// contention of transfers. Also the memory along each rank's order.

#ifndef SEARCH_PROBLEM_TIMING_H_
#define SEARCH_PROBLEM_TIMING_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

// Times `schedule`. Errors: INVALID_ARGUMENT when a stage is missing, appears
// twice or is not to run, when a choice is out of range, or when the ranks wait
// for each other (deadlock); the message names the stage.
//
// Times stay below 2^64: a path takes every duration once and every transfer
// twice at most. Where they reach 2^63, which takes transfers of 2^62 ns, the
// signed fields hold the unsigned value's bits.
absl::StatusOr<StageTimes> TimeSchedule(const ProblemGraph& graph,
                                        const Schedule& schedule);

// The most bytes live on each rank along its order. REQUIRES: `schedule` is
// complete (TimeSchedule returned OK).
std::vector<int64_t> PeakBytes(const ProblemGraph& graph,
                               const Schedule& schedule);

// OK when no rank's peak is over its limit; else RESOURCE_EXHAUSTED that names
// rank, bytes and limit. REQUIRES: as PeakBytes.
absl::Status CheckMemory(const ProblemGraph& graph, const Schedule& schedule);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_TIMING_H_
