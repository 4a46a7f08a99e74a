// What a plan costs besides the search: from a step's batch to checked
// programs, the search ended at its first schedule. Run:
//   bazel run //search:planner_benchmark

#include <memory>
#include <string>

#include "benchmark/benchmark.h"
#include "search/planner.h"
#include "semu/base/check.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

// Counters, per plan: of the wall-clock time, the search's first schedule, the
// lowering with the prediction, and the checkers, in ms; stages planned.
void BM_PlanWithOneEvaluation(benchmark::State& state, const char* setup) {
  const v1::Job proto = *semu::MakeSetup(setup);
  const semu::Job job = *semu::JobFromProto(proto);
  const semu::Batch batch = *semu::BatchFromProto(
      *semu::SampleBatch(
          proto, {.seed = 1, .microbatches = static_cast<int>(state.range(0))}),
      job);
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const auto prepared = planner->Prepare(job, std::nullopt, {});
  PW_CHECK(prepared.ok());
  PlanOptions options;
  options.search.budget.evaluations = 1;
  options.search.threads = 2;
  double search_ms = 0, lower_ms = 0, check_ms = 0;
  int64_t stages = 0;
  for (auto _ : state) {
    const auto plan = planner->Plan(**prepared, batch, options);
    PW_CHECK(plan.ok());
    search_ms += static_cast<double>(plan->report.search_ns) * 1e-6;
    lower_ms += static_cast<double>(plan->report.lower_ns) * 1e-6;
    check_ms += static_cast<double>(plan->report.check_ns) * 1e-6;
    stages = 0;
    for (const auto& rank : plan->schedule.ranks) {
      stages += static_cast<int64_t>(rank.size());
    }
  }
  using benchmark::Counter;
  state.counters["search_ms"] = Counter(search_ms, Counter::kAvgIterations);
  state.counters["lower_ms"] = Counter(lower_ms, Counter::kAvgIterations);
  state.counters["check_ms"] = Counter(check_ms, Counter::kAvgIterations);
  state.counters["stages"] = static_cast<double>(stages);
}
BENCHMARK_CAPTURE(BM_PlanWithOneEvaluation, vlm_s, "vlm-s")->Arg(64);
BENCHMARK_CAPTURE(BM_PlanWithOneEvaluation, vlm_l, "vlm-l")->Arg(64);
BENCHMARK_CAPTURE(BM_PlanWithOneEvaluation, t2v_s, "t2v-s")->Arg(64);
BENCHMARK_CAPTURE(BM_PlanWithOneEvaluation, omni, "omni")->Arg(64);

}  // namespace
}  // namespace pipeweaver::search
