// Lowering: from a schedule to the programs of the ranks, with sends, receives,
// host copies and the points where gradients are complete.
//
// How it works. Lowering takes the stages in a topological order of the
// schedule (by predicted end; ties by rank, never before what a stage depends
// on) and appends each action to its rank's program at a moment at which it
// could be executed at once. Transfers are numbered as their sends are
// appended. Before a rank posts a send, it posts every receive numbered lower
// that it still owes, and it posts receives in order: so each rank's posts
// ascend. A wait is appended when both posts of its transfer have been.
//
// Why the programs end, whatever the durations, with one in-order channel per
// pair of ranks, both directions in it. Only waits block. Transfer t ends once
// its two posts are executed and the lower transfers of its channel have ended.
// What stands before a post of t on its rank are waits of transfers that the
// rank posted before, thus lower than t. By induction over t every post is
// reached and every transfer ends; so every wait is over at some time. Buffered
// sends only take constraints away. The times given play no part in this: they
// only decide which of the allowed places an action takes.
//
// Places: POST_SEND right behind its stage. POST_RECV ahead of the stage that
// the receiver is predicted to run while the value is made, later when the
// limits demand. WAIT_RECV just before its consumer, earlier when
// max_receives_ahead demands. WAIT_SEND once a whole stage has run since the
// predicted arrival, or earlier when memory demands, or at the end. OFFLOAD
// right behind its F, RELOAD a stage ahead of its backward when memory allows.

#ifndef SEARCH_LOWER_LOWER_H_
#define SEARCH_LOWER_LOWER_H_

#include "absl/status/statusor.h"
#include "search/lower/program.h"
#include "search/partition/step_problem.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

// Lowers `schedule` of step.problem. Predicted times of stages are those of
// `times`, transfers not contending (search/plan_evaluator.h predicts better).
//
// REQUIRES: the schedule passes CheckPlan with these times; `graph` is that of
// step.problem.
// Errors: RESOURCE_EXHAUSTED when transfers and copies do not fit in memory
// beside the activations, naming rank, bytes and limit; FAILED_PRECONDITION
// when the ranks' orders wait for each other. Thread-safe.
absl::StatusOr<StepPrograms> Lower(const StepProblem& step,
                                   const ProblemGraph& graph,
                                   const Schedule& schedule,
                                   const StageTimes& times,
                                   const ProgramLimits& limits);

// The same where there is no graph yet.
absl::StatusOr<StepPrograms> Lower(const StepProblem& step,
                                   const Schedule& schedule,
                                   const StageTimes& times,
                                   const ProgramLimits& limits);

}  // namespace pipeweaver::search

#endif  // SEARCH_LOWER_LOWER_H_
