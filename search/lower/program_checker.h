// The program checker: judges the lowered programs of a step against the step's
// problem. It shares no code with the lowering. Runs on every plan before it
// leaves.

#ifndef SEARCH_LOWER_PROGRAM_CHECKER_H_
#define SEARCH_LOWER_PROGRAM_CHECKER_H_

#include "absl/status/status.h"
#include "search/lower/program.h"
#include "search/partition/step_problem.h"

namespace pipeweaver::search {

// Checks that
// - every item of a microbatch and module is in one sub-microbatch, and every
//   sub-microbatch passes each segment of its module in one sweep;
// - every required stage runs once, on its rank, with one memory choice, behind
//   what it depends on; copies to and from the host stand where the choice asks
//   for them, and GRADS_READY behind the last backward of each chunk;
// - every value that crosses ranks crosses in one transfer, is sent behind its
//   stage and waited for before its consumer; posts and waits pair up, and each
//   rank's posts stand in the global order;
// - the event graph has no cycle, with buffered sends and with rendezvous on
//   one in-order channel per pair of ranks that carries both directions: so
//   the programs end, whatever the durations;
// - receives posted and not waited for stay within the limit, and memory (see
//   program.h) stays within each rank's limit; peak_bytes is exact.
//
// REQUIRES: step.problem is well formed, the vectors of `step` have the shapes
// that step_problem.h gives. Linear in actions and dependencies.
// Errors: FAILED_PRECONDITION naming the first violation. Thread-safe.
absl::Status CheckPrograms(const StepProblem& step,
                           const StepPrograms& programs,
                           const ProgramLimits& limits);

// CheckPrograms in two parts, for callers that have the step earlier than its
// programs: what the first point says, and all others.
absl::Status CheckSplit(const StepProblem& step);
// REQUIRES: CheckSplit has passed.
absl::Status CheckActions(const StepProblem& step, const StepPrograms& programs,
                          const ProgramLimits& limits);

}  // namespace pipeweaver::search

#endif  // SEARCH_LOWER_PROGRAM_CHECKER_H_
