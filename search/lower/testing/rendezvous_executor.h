// Executes a step's programs as an unforgiving transport would: rendezvous,
// with one in-order channel per pair of ranks that carries both directions. Two
// ways: one action at a time in random interleavings, and on real threads.

#ifndef SEARCH_LOWER_TESTING_RENDEZVOUS_EXECUTOR_H_
#define SEARCH_LOWER_TESTING_RENDEZVOUS_EXECUTOR_H_

#include <random>

#include "absl/status/status.h"
#include "search/lower/program.h"
#include "search/partition/step_problem.h"

namespace pipeweaver::search::testing {

// Runs to the end in one random interleaving of the ranks' actions and of the
// transfers' ends: every choice of durations amounts to such an interleaving.
// Errors: DEADLINE_EXCEEDED when the ranks hang, INTERNAL when a channel pairs
// two different transfers or a stage runs without one of its inputs.
absl::Status ExecuteInterleaved(const StepProblem& step,
                                const StepPrograms& programs,
                                std::mt19937_64& random);

// Runs on a thread a rank; channels block as above. Errors: as
// ExecuteInterleaved; a hang is told by nothing having happened for a while.
absl::Status ExecuteOnThreads(const StepPrograms& programs);

}  // namespace pipeweaver::search::testing

#endif  // SEARCH_LOWER_TESTING_RENDEZVOUS_EXECUTOR_H_
