// What it costs to get from a schedule to sealed programs: the certificate of
// both checkers, the lowering, the prediction, the bytes.
//
//   bazel run -c opt //search/lower:lower_benchmark
//
// The workload is shaped like vlm-s with 64 microbatches: 4 ranks, 3 vision
// sub-microbatches and one of text in 2 segments a microbatch, backward split:
// 1280 stage pairs, 3840 stages. `items_per_second` counts stages.

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "benchmark/benchmark.h"
#include "search/lower/lower.h"
#include "search/lower/program_checker.h"
#include "search/lower/program_proto.h"
#include "search/plan/plan_checker.h"
#include "search/plan/safe_order.h"
#include "search/plan_evaluator.h"
#include "search/problem/problem_graph.h"
#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

constexpr int kRanks = 4;
constexpr int kMicrobatches = 64;
constexpr int kVision = 0;
constexpr int kText = 1;

// Everything a plan goes through, made once.
struct Workload {
  StepProblem step;
  ProgramLimits limits;
  Schedule schedule;
  StageTimes times;
  StepPrograms programs;
  int64_t stages = 0;

  Workload() {
    step.problem.ranks = kRanks;
    step.problem.split_backward = true;
    step.problem.memory_limit_bytes.assign(kRanks, int64_t{16} << 30);
    step.choices.resize(2);
    step.choices[kVision].assign(1, std::vector(kRanks, Choices()));
    step.choices[kText].assign(2, std::vector(kRanks, Choices()));
    for (int i = 0; i < kMicrobatches; ++i) {
      std::vector<int> vision;
      for (int j = 0; j < 3; ++j) {
        step.sub_microbatches.push_back({kVision, i, {j}, 2704});
        vision.push_back(static_cast<int>(step.problem.sweeps.size()));
        AddSweep(kVision, i, 0, 1'000'000 + 10'000 * ((7 * i + j) % 90), {});
      }
      step.sub_microbatches.push_back({kText, i, {0}, 8192});
      for (int k = 0; k < 2; ++k) {
        AddSweep(kText, i, k, 2'000'000,
                 k == 0
                     ? vision
                     : std::vector<int>{
                           static_cast<int>(step.problem.sweeps.size()) - 1});
      }
    }
    limits = {step.problem.memory_limit_bytes, 2};
    schedule = *SafeOrder(step.problem);
    times = CheckSchedule(step.problem, schedule)->times;
    programs = *Lower(step, schedule, times, limits);
    for (const auto& rank : schedule.ranks) {
      stages += static_cast<int64_t>(rank.size());
    }
  }

 private:
  static std::vector<MemoryChoice> Choices() {
    std::vector<MemoryChoice> choices(6);
    for (int i = 0; i < 6; ++i) {
      choices[i].name = absl::StrCat("full", i);
      choices[i].full_recompute_layers = i;
      choices[i].keep_layers = 5 - i;
    }
    return choices;
  }

  void AddSweep(int module, int microbatch, int segment, int64_t ns,
                const std::vector<int>& after) {
    Sweep sweep;
    sweep.id = absl::StrCat("mb", microbatch, "/", module, "/", segment);
    sweep.microbatch = microbatch;
    sweep.after.assign(after.begin(), after.end());
    for (int r = 0; r < kRanks; ++r) {
      Stage stage;
      stage.rank = r;
      stage.transfer_ns = 200'000;
      for (int i = 0; i < 6; ++i) {
        Choice choice;
        choice.forward_ns = ns;
        choice.input_grad_ns = ns + ns * i / 5;
        choice.weight_grad_ns = ns;
        choice.activation_bytes = int64_t{60 - 10 * i} << 20;
        choice.backward_bytes = int64_t{70} << 20;
        choice.weight_grad_bytes = int64_t{40} << 20;
        stage.choices.Mutable().push_back(choice);
      }
      sweep.stages.push_back(stage);
    }
    step.problem.sweeps.push_back(sweep);
    step.sweeps.push_back(
        {static_cast<int>(step.sub_microbatches.size()) - 1, segment});
    step.output_bytes.push_back(4 << 20);
    step.after_bytes.emplace_back(after.size(), 4 << 20);
  }
};

const Workload& TheWorkload() {
  static const Workload* const workload = new Workload;
  return *workload;
}

void CountStages(benchmark::State& state) {
  state.SetItemsProcessed(state.iterations() * TheWorkload().stages);
}

void BM_SafeOrder(benchmark::State& state) {
  for (auto _ : state) {
    benchmark::DoNotOptimize(SafeOrder(TheWorkload().step.problem));
  }
  CountStages(state);
}
BENCHMARK(BM_SafeOrder);

void BM_CheckPlan(benchmark::State& state) {
  const Workload& w = TheWorkload();
  for (auto _ : state) {
    PW_CHECK(CheckPlan(w.step.problem, w.schedule, w.times).ok());
  }
  CountStages(state);
}
BENCHMARK(BM_CheckPlan);

void BM_Lower(benchmark::State& state) {
  const Workload& w = TheWorkload();
  const ProblemGraph graph = BuildProblemGraph(w.step.problem);
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        Lower(w.step, graph, w.schedule, w.times, w.limits));
  }
  CountStages(state);
}
BENCHMARK(BM_Lower);

void BM_CheckPrograms(benchmark::State& state) {
  const Workload& w = TheWorkload();
  for (auto _ : state) {
    PW_CHECK(CheckPrograms(w.step, w.programs, w.limits).ok());
  }
  CountStages(state);
}
BENCHMARK(BM_CheckPrograms);

void BM_Predict(benchmark::State& state) {
  const Workload& w = TheWorkload();
  const ProblemGraph graph = BuildProblemGraph(w.step.problem);
  StepPrograms programs = w.programs;
  for (auto _ : state) {
    PlanEvaluator::WriteTimes(
        *PlanEvaluator::Predict(w.step, graph, programs, {}), &programs);
  }
  CountStages(state);
}
BENCHMARK(BM_Predict);

void BM_SerializePlan(benchmark::State& state) {
  const Workload& w = TheWorkload();
  for (auto _ : state) {
    benchmark::DoNotOptimize(SerializePlan(w.step, w.programs, {}));
  }
  CountStages(state);
}
BENCHMARK(BM_SerializePlan);

void BM_ParseProgram(benchmark::State& state) {
  const Workload& w = TheWorkload();
  const std::string bytes = SerializePlan(w.step, w.programs, {}).programs[0];
  for (auto _ : state) PW_CHECK(ParseProgram(bytes).ok());
  state.SetItemsProcessed(state.iterations() *
                          static_cast<int64_t>(w.schedule.ranks[0].size()));
  state.SetLabel(absl::StrCat(bytes.size(), " bytes"));
}
BENCHMARK(BM_ParseProgram);

}  // namespace
}  // namespace pipeweaver::search
