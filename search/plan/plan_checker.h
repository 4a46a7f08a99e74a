// The plan checker: judges a schedule against its scheduling problem. It shares
// no code with the strategies nor with the timing that they search by, so that
// an error there cannot hide here. Runs on every plan before it leaves.

#ifndef SEARCH_PLAN_PLAN_CHECKER_H_
#define SEARCH_PLAN_PLAN_CHECKER_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "search/problem/problem.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

// What the order of a valid schedule amounts to.
struct CheckedSchedule {
  StageTimes times;
  // Most bytes live along each rank's order, transfer buffers not counted.
  std::vector<int64_t> peak_bytes;
};

// Checks that every required stage runs once and on its rank, that a stage pair
// has one memory choice, that the ranks' orders and the dependencies form no
// circle, and that memory stays within each rank's limit along its order; then
// times the schedule from the order alone (a stage starts as
// soon as its rank is free and its inputs have arrived).
//
// REQUIRES: `problem` is well formed. Linear in stages and dependencies.
// Errors: FAILED_PRECONDITION naming the first violation. Thread-safe.
absl::StatusOr<CheckedSchedule> CheckSchedule(const Problem& problem,
                                              const Schedule& schedule);

// CheckSchedule, and in addition that every claimed start, end and the makespan
// is exact.
absl::Status CheckPlan(const Problem& problem, const Schedule& schedule,
                       const StageTimes& claimed);

}  // namespace pipeweaver::search

#endif  // SEARCH_PLAN_PLAN_CHECKER_H_
