// See plan_simulator.h.

#include "server/plan_simulator.h"

#include "search/plan_evaluator.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::server {
namespace {

// As the planner predicts with, so that a run without changes gives the
// makespan of the plan's report.
search::LinkSpeeds SpeedsOf(const semu::Job& job) {
  search::LinkSpeeds speeds;
  speeds.p2p_latency_ns = job.links.p2p_inter_node.latency_ns;
  speeds.host_latency_ns = job.links.host.latency_ns;
  speeds.host_bandwidth_bytes_per_second =
      job.links.host.bandwidth_bytes_per_second;
  return speeds;
}

}  // namespace

absl::StatusOr<std::vector<int64_t>> SimulatePlan(
    const search::PlannableJob& job, const search::StepPlan& plan,
    const Simulation& simulation, const std::atomic<bool>& cancelled) {
  const search::PlanEvaluator evaluator(plan.step, plan.programs,
                                        SpeedsOf(job.job));
  search::EvaluationOptions options;
  options.latency_factor = simulation.latency_factor;
  options.bandwidth_factor = simulation.bandwidth_factor;
  options.duration_noise = simulation.duration_noise;
  std::vector<int64_t> makespans;
  for (int run = 0; run < simulation.runs; ++run) {
    if (cancelled.load()) {
      return absl::CancelledError("the call was cancelled");
    }
    options.seed = simulation.seed + run;
    PW_ASSIGN_OR_RETURN(const search::StepEvaluation evaluation,
                        evaluator.Evaluate(options));
    makespans.push_back(evaluation.makespan_ns);
  }
  return makespans;
}

}  // namespace pipeweaver::server
