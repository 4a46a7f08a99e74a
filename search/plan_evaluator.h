// How the search asks for predictions: what a step's programs take in time and
// memory, by the step emulator (semu/engine/step_emulator.h).

#ifndef SEARCH_PLAN_EVALUATOR_H_
#define SEARCH_PLAN_EVALUATOR_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "search/lower/program.h"
#include "search/partition/step_problem.h"
#include "search/problem/problem_graph.h"
#include "semu/engine/step_emulator.h"
#include "semu/engine/step_program.h"
#include "semu/model/job.h"
#include "semu/trace/timeline.h"

namespace pipeweaver::search {

// What of the links the scheduling problem does not say.
struct LinkSpeeds {
  // A transfer takes the link of semu::P2pLink, whose latency is the part of
  // its duration that does not occupy a port; transfers that take less are all
  // latency. Host links without bandwidth copy in no time.
  semu::Parallelism parallelism;
  semu::Links links;
};

// Those of a job.
LinkSpeeds LinkSpeedsOf(const semu::Job& job);

struct EvaluationOptions {
  // Off: the times of the scheduling problem, in which transfers do not
  // contend, sends are buffered and copies take no time. The makespan is then
  // that of the schedule, to the nanosecond, if receives ahead were not
  // limited.
  bool contention = true;
  // On every transfer, > 0. A bandwidth factor of 2 halves the time that ports
  // are occupied.
  double latency_factor = 1;
  double bandwidth_factor = 1;
  // Standard deviation of a factor on every duration; drawn from `seed`.
  double duration_noise = 0;
  uint64_t seed = 0;
};

struct StepEvaluation {
  struct Rank {
    int64_t busy_ns = 0;           // computing
    int64_t transfer_wait_ns = 0;  // in WAIT_SEND and WAIT_RECV
    int64_t copy_wait_ns = 0;      // in WAIT_COPY
    int64_t end_ns = 0;            // of its program
    int64_t peak_bytes = 0;        // as StepPrograms::peak_bytes
  };
  std::vector<Rank> ranks;
  int64_t makespan_ns = 0;  // end of the last stage
};

// Evaluates one step's programs, any number of times. Immutable; thread-safe.
class PlanEvaluator {
 public:
  // REQUIRES: `programs` passed CheckPrograms on `step`. Keeps neither.
  PlanEvaluator(const StepProblem& step, const StepPrograms& programs,
                const LinkSpeeds& links);

  // Errors: INVALID_ARGUMENT for options out of range, or that make the step's
  // durations 2^60 ns or more in all, naming field and value.
  absl::StatusOr<StepEvaluation> Evaluate(
      const EvaluationOptions& options) const;

  // The times of every action besides. Errors as Evaluate.
  absl::StatusOr<semu::EmulatedStep> Emulate(
      const EvaluationOptions& options) const;

  // What Emulate({}) of such an evaluator says, in less time: without finding
  // out what the programs hold in memory. REQUIRES: as the constructor;
  // `graph` is that of step.problem.
  // Errors: FAILED_PRECONDITION when the ranks wait for each other.
  static absl::StatusOr<semu::EmulatedStep> Predict(
      const StepProblem& step, const ProblemGraph& graph,
      const StepPrograms& programs, const LinkSpeeds& links);

  // Writes the times of each action and the makespan into `programs`, those of
  // construction.
  static void WriteTimes(const semu::EmulatedStep& emulated,
                         StepPrograms* programs);

  // Bytes live on each rank over time, by the times of the actions in
  // `programs`, those of construction.
  std::vector<std::vector<semu::MemorySample>> Memory(
      const StepPrograms& programs) const;

 private:
  semu::StepProgram program_;
  std::vector<int64_t> peak_bytes_;  // [rank]
};

}  // namespace pipeweaver::search

#endif  // SEARCH_PLAN_EVALUATOR_H_
