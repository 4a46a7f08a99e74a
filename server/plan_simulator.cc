// See plan_simulator.h.

#include "server/plan_simulator.h"

#include <random>

#include "search/plan_evaluator.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::server {

absl::StatusOr<std::vector<int64_t>> SimulatePlan(
    const search::PlannableJob& job, const search::StepPlan& plan,
    const Simulation& simulation, const std::atomic<bool>& cancelled) {
  const search::PlanEvaluator evaluator(plan.step, plan.programs,
                                        search::LinkSpeedsOf(job.job));
  search::EvaluationOptions options;
  options.latency_factor = simulation.latency_factor;
  options.bandwidth_factor = simulation.bandwidth_factor;
  options.duration_noise = simulation.duration_noise;
  std::vector<int64_t> makespans;
  // Those of neighbouring seeds have nothing in common.
  std::mt19937_64 seeds(simulation.seed);
  for (int run = 0; run < simulation.runs; ++run) {
    if (cancelled.load()) {
      return absl::CancelledError("the call was cancelled");
    }
    options.seed = seeds();
    PW_ASSIGN_OR_RETURN(const search::StepEvaluation evaluation,
                        evaluator.Evaluate(options));
    makespans.push_back(evaluation.makespan_ns);
  }
  return makespans;
}

}  // namespace pipeweaver::server
