// The coverage checker: judges a step's problem against the batch that was
// submitted. It shares no code with what splits batches and builds problems.
// Runs on every plan before it leaves, beside the program checker, which judges
// programs against the problem.

#ifndef SEARCH_LOWER_COVERAGE_CHECKER_H_
#define SEARCH_LOWER_COVERAGE_CHECKER_H_

#include "absl/status/status.h"
#include "search/partition/step_problem.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Checks that
// - each item of the batch is in one sub-microbatch of its module, and nothing
//   else is; `empty` lists just the pairs without items;
// - a sub-microbatch passes the segments of its module one after the other, and
//   its first one waits for the last one of each sub-microbatch with an item
//   that it consumes;
// - sweeps have a backward where something trainable stands in their module or
//   upstream, and none in a forward-only batch.
//
// REQUIRES: `batch` is validated for `job`; the vectors of `step` have the
// shapes that step_problem.h gives. Linear in items, uses and dependencies.
// Errors: FAILED_PRECONDITION naming the first violation. Thread-safe.
absl::Status CheckCoverage(const semu::Job& job, const semu::Batch& batch,
                           const StepProblem& step);

}  // namespace pipeweaver::search

#endif  // SEARCH_LOWER_COVERAGE_CHECKER_H_
