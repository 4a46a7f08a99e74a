// What planning costs before the search starts, on sample batches of the
// set-ups. Run: bazel run //search/partition:partition_benchmark

#include <string>

#include "benchmark/benchmark.h"
#include "search/partition/baselines.h"
#include "search/partition/layout_planner.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem_builder.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

struct Input {
  explicit Input(const std::string& setup, int microbatches) {
    const v1::Job proto = *semu::MakeSetup(setup);
    job = *semu::JobFromProto(proto);
    batch = *semu::BatchFromProto(
        *semu::SampleBatch(proto, {.seed = 1, .microbatches = microbatches}),
        job);
    layout = *PlanLayout(job, costs);
    memory = *PlanMemory(job, layout, costs);
  }

  semu::Job job;
  semu::Batch batch;
  semu::OpGraphCost costs;
  semu::Layout layout;
  MemoryPlan memory;
};

// From a batch to its scheduling problem: on the way of every step.
void BM_BuildStepProblem(benchmark::State& state, const char* setup) {
  const Input input(setup, static_cast<int>(state.range(0)));
  size_t sweeps = 0;
  for (auto _ : state) {
    const auto step = BuildStepProblem(input.job, input.layout,
                                       input.memory.activation_limit_bytes,
                                       input.batch, input.costs);
    sweeps = step->problem.sweeps.size();
  }
  state.counters["sweeps"] = static_cast<double>(sweeps);
}
BENCHMARK_CAPTURE(BM_BuildStepProblem, vlm_s, "vlm-s")->Arg(16)->Arg(64);
BENCHMARK_CAPTURE(BM_BuildStepProblem, vlm_l, "vlm-l")->Arg(64)->Arg(256);
BENCHMARK_CAPTURE(BM_BuildStepProblem, t2v_s, "t2v-s")->Arg(64);
BENCHMARK_CAPTURE(BM_BuildStepProblem, omni, "omni")->Arg(64);

// Once a registration.
void BM_PlanLayout(benchmark::State& state, const char* setup) {
  const Input input(setup, 1);
  for (auto _ : state) {
    benchmark::DoNotOptimize(PlanLayout(input.job, input.costs));
  }
}
BENCHMARK_CAPTURE(BM_PlanLayout, vlm_l, "vlm-l");
BENCHMARK_CAPTURE(BM_PlanLayout, omni, "omni");

void BM_PlanBaseline(benchmark::State& state, Baseline baseline) {
  const Input input("vlm-s", 64);
  for (auto _ : state) {
    benchmark::DoNotOptimize(PlanBaseline(baseline, input.job, input.batch,
                                          input.batch, input.costs));
  }
}
BENCHMARK_CAPTURE(BM_PlanBaseline, megatron, Baseline::kMegatron);
BENCHMARK_CAPTURE(BM_PlanBaseline, interleaved_1f1b,
                  Baseline::kInterleaved1f1b);
BENCHMARK_CAPTURE(BM_PlanBaseline, optimus, Baseline::kOptimus);

}  // namespace
}  // namespace pipeweaver::search
