// Predictions agree with schedules where nothing contends, are never below them
// where something does, and come to the same memory as the lowering.

#include "search/plan_evaluator.h"

#include <limits>
#include <random>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/lower/lower.h"
#include "search/plan/plan_checker.h"
#include "search/plan/safe_order.h"
#include "search/plan/testing/random_problem.h"
#include "search/problem/problem_graph.h"
#include "semu/cost/cost_model.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

struct Lowered {
  StepProblem step;
  Schedule schedule;
  StageTimes times;
  StepPrograms programs;
};

Lowered RandomLowered(std::mt19937_64& random, int max_receives_ahead) {
  Lowered l;
  l.step = testing::RandomStepProblem(random);
  l.schedule = testing::Uniform(random, 0, 1) == 0
                   ? testing::RandomSchedule(l.step.problem, random)
                   : *SafeOrder(l.step.problem);
  l.times = CheckSchedule(l.step.problem, l.schedule)->times;
  l.programs = *Lower(l.step, l.schedule, l.times,
                      {l.step.problem.memory_limit_bytes, max_receives_ahead});
  return l;
}

TEST(PlanEvaluatorTest, EqualsTheScheduleWithoutContention) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 1000; ++i) {
    Lowered l = RandomLowered(random, std::numeric_limits<int>::max());
    EvaluationOptions options;
    options.contention = false;
    const PlanEvaluator evaluator(l.step, l.programs, {});
    const auto evaluation = evaluator.Evaluate(options);
    ASSERT_TRUE(evaluation.ok()) << evaluation.status();
    PlanEvaluator::WriteTimes(*evaluator.Emulate(options), &l.programs);
    EXPECT_EQ(evaluation->makespan_ns, l.times.makespan_ns);
    EXPECT_EQ(l.programs.makespan_ns, l.times.makespan_ns);
    for (int r = 0; r < l.step.problem.ranks; ++r) {
      EXPECT_EQ(evaluation->ranks[r].peak_bytes, l.programs.peak_bytes[r]);
      size_t stage = 0;
      for (const Action& a : l.programs.ranks[r]) {
        if (!IsCompute(a.kind)) continue;
        EXPECT_EQ(a.start_ns, l.times.ranks[r][stage].start_ns);
        EXPECT_EQ(a.end_ns, l.times.ranks[r][stage].end_ns);
        ++stage;
      }
    }
  }
}

TEST(PlanEvaluatorTest, ContentionNeverHelps) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 1000; ++i) {
    const Lowered l = RandomLowered(random, 1 + i % 3);
    LinkSpeeds links;
    links.links.p2p_intra_node.latency_ns = testing::Uniform(random, 0, 5);
    links.links.host.bandwidth_bytes_per_second = 10'000'000'000;
    const PlanEvaluator evaluator(l.step, l.programs, links);
    const auto evaluation = evaluator.Evaluate({});
    ASSERT_TRUE(evaluation.ok()) << evaluation.status();
    EXPECT_GE(evaluation->makespan_ns, l.times.makespan_ns);
    for (int r = 0; r < l.step.problem.ranks; ++r) {
      const StepEvaluation::Rank& rank = evaluation->ranks[r];
      EXPECT_EQ(rank.peak_bytes, l.programs.peak_bytes[r]);
      EXPECT_EQ(rank.busy_ns + rank.transfer_wait_ns + rank.copy_wait_ns,
                rank.end_ns);
    }
  }
}

TEST(PlanEvaluatorTest, PredictsWhatItEmulates) {
  std::mt19937_64 random(4);
  for (int i = 0; i < 300; ++i) {
    const Lowered l = RandomLowered(random, 1 + i % 3);
    LinkSpeeds links;
    links.links.p2p_intra_node.latency_ns = testing::Uniform(random, 0, 5);
    links.links.host.bandwidth_bytes_per_second = 10'000'000'000;
    const auto emulated = PlanEvaluator(l.step, l.programs, links).Emulate({});
    const auto predicted = PlanEvaluator::Predict(
        l.step, BuildProblemGraph(l.step.problem), l.programs, links);
    ASSERT_TRUE(predicted.ok()) << predicted.status();
    EXPECT_EQ(predicted->makespan_ns, emulated->makespan_ns);
    EXPECT_EQ(predicted->ends_ns, emulated->ends_ns);
  }
}

// Of the link that a transfer takes, not of another.
TEST(PlanEvaluatorTest, LatencyIsThatOfTheLink) {
  std::mt19937_64 random(5);
  const Lowered l = RandomLowered(random, 3);
  LinkSpeeds links;
  links.links.p2p_inter_node.latency_ns = 1'000'000;
  const auto makespan = [&] {
    return PlanEvaluator(l.step, l.programs, links).Evaluate({})->makespan_ns;
  };
  const int64_t within_a_node = makespan();
  links.links.p2p_inter_node.latency_ns = 0;
  EXPECT_EQ(makespan(), within_a_node);
  links.links.p2p_inter_node.latency_ns = 1'000'000;
  links.links.gpus_per_node = 1;
  EXPECT_LT(makespan(), within_a_node);
}

// A copy counts by itself, and not in the stage's length, too.
TEST(PlanEvaluatorTest, HostCopiesCountOnce) {
  Lowered l;
  Choice choice;
  choice.forward_ns = 25;  // it computes for 10 and copies for 25
  choice.forward_copy_wait_ns = 15;
  choice.input_grad_ns = choice.weight_grad_ns = 20;
  choice.backward_copy_wait_ns = 10;
  MemoryChoice memory;
  memory.offload_layers = 1;
  memory.offload_bytes = 25;
  l.step.problem.ranks = 1;
  l.step.problem.memory_limit_bytes = {1000};
  Sweep sweep;
  sweep.id = "mb0";
  sweep.stages = {{0, 0, {choice}}};
  l.step.problem.sweeps = {sweep};
  l.step.choices = {{{{memory}}}};
  l.step.sub_microbatches = {{0, 0, {0}, 1}};
  l.step.sweeps = {{0, 0}};
  l.step.output_bytes = {0};
  l.step.after_bytes = {{}};
  l.schedule = *SafeOrder(l.step.problem);
  l.times = CheckSchedule(l.step.problem, l.schedule)->times;
  EXPECT_EQ(l.times.makespan_ns, 25 + 40);
  l.programs = *Lower(l.step, l.schedule, l.times, {{1000}, 2});
  LinkSpeeds links;
  links.links.host.bandwidth_bytes_per_second = 1'000'000'000;
  const auto evaluation = PlanEvaluator(l.step, l.programs, links).Evaluate({});
  ASSERT_TRUE(evaluation.ok()) << evaluation.status();
  // With nothing beside them, both copies are waited for.
  EXPECT_EQ(evaluation->makespan_ns, 10 + 25 + 25 + 30);
  EXPECT_EQ(evaluation->ranks[0].busy_ns, 10 + 30);
  // However slow the link, no copy passes what a stage may take.
  links.links.host.bandwidth_bytes_per_second = 1;
  l.step.choices[0][0][0][0].offload_bytes = 1'000'000'000'000'000;
  const auto slow = PlanEvaluator(l.step, l.programs, links).Evaluate({});
  ASSERT_TRUE(slow.ok()) << slow.status();
  EXPECT_EQ(slow->makespan_ns, 10 + 2 * semu::kMaxCost + 30);
}

TEST(PlanEvaluatorTest, RefusesOptionsOutOfRange) {
  std::mt19937_64 random(3);
  const Lowered l = RandomLowered(random, 2);
  const PlanEvaluator evaluator(l.step, l.programs, {});
  EvaluationOptions options;
  options.latency_factor = 0;
  EXPECT_THAT(std::string(evaluator.Evaluate(options).status().message()),
              HasSubstr("latency_factor: 0, must be above 0"));
  options = {};
  options.bandwidth_factor = std::numeric_limits<double>::quiet_NaN();
  EXPECT_EQ(evaluator.Evaluate(options).status().code(),
            absl::StatusCode::kInvalidArgument);
  options = {};
  options.duration_noise = 2;
  EXPECT_THAT(std::string(evaluator.Evaluate(options).status().message()),
              HasSubstr("duration_noise: 2, must be 0 .. 1"));
  // In range, but not for this step.
  StepPrograms programs = l.programs;
  for (Transfer& x : programs.transfers) x.duration_ns = 1'000'000'000'000;
  LinkSpeeds links;
  links.links.p2p_intra_node.latency_ns = 1'000'000'000'000;
  options = {};
  options.latency_factor = 1e6;
  ASSERT_GE(programs.transfers.size(), 2u);
  const auto refused = PlanEvaluator(l.step, programs, links).Evaluate(options);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("latency_factor: 1e+06"));
}

}  // namespace
}  // namespace pipeweaver::search
