// Tests of timing.h.

#include "search/problem/timing.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_validation.h"

namespace pipeweaver::search {
namespace {

Choice MakeChoice(int64_t forward, int64_t input, int64_t weight,
                  int64_t bytes) {
  Choice choice;
  choice.forward_ns = forward;
  choice.input_grad_ns = input;
  choice.weight_grad_ns = weight;
  choice.activation_bytes = bytes;
  choice.backward_bytes = bytes + 2;
  choice.weight_grad_bytes = bytes + 1;
  choice.fused_backward_bytes = bytes + 3;
  return choice;
}

// One sweep over two ranks, split backward.
Problem TwoRanks() {
  Problem problem;
  problem.ranks = 2;
  problem.split_backward = true;
  problem.memory_limit_bytes = {100, 100};
  Sweep sweep;
  sweep.id = "s";
  sweep.stages = {
      {.rank = 0, .transfer_ns = 5, .choices = {MakeChoice(10, 20, 30, 4)}},
      {.rank = 1, .transfer_ns = 9, .choices = {MakeChoice(1, 2, 3, 8)}}};
  problem.sweeps.push_back(sweep);
  return problem;
}

ScheduledStage At(StageKind kind, int stage) {
  return {.kind = kind, .sweep = 0, .stage = stage, .choice = 0};
}

Schedule InOrder() {
  Schedule schedule;
  schedule.ranks = {{At(StageKind::kForward, 0), At(StageKind::kInputGrad, 0),
                     At(StageKind::kWeightGrad, 0)},
                    {At(StageKind::kForward, 1), At(StageKind::kInputGrad, 1),
                     At(StageKind::kWeightGrad, 1)}};
  return schedule;
}

TEST(TimeScheduleTest, TransfersTakeTheTimeOfTheForwardsStage) {
  const ProblemGraph graph = BuildProblemGraph(TwoRanks());
  const auto times = TimeSchedule(graph, InOrder());
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_EQ(times->ranks[1][0].start_ns, 15);  // 10 + 5
  EXPECT_EQ(times->ranks[0][1].start_ns, 23);  // 15 + 1 + 2 + 5
  EXPECT_EQ(times->makespan_ns, 73);
  EXPECT_EQ(LowerBound(graph), 73);
}

TEST(TimeScheduleTest, CountsMemoryInPhases) {
  Problem problem = TwoRanks();
  problem.memory_limit_bytes = {6, 10};
  const ProblemGraph graph = BuildProblemGraph(problem);
  EXPECT_EQ(PeakBytes(graph, InOrder()), (std::vector<int64_t>{6, 10}));
  EXPECT_TRUE(CheckMemory(graph, InOrder()).ok());
  problem.memory_limit_bytes = {5, 10};
  const absl::Status status =
      CheckMemory(BuildProblemGraph(problem), InOrder());
  EXPECT_NE(status.message().find("rank 0 holds 6 bytes"), std::string::npos);
}

TEST(TimeScheduleTest, FusedBackwardStandsForBoth) {
  Problem problem = TwoRanks();
  problem.sweeps[0].stages[0].choices.Mutable()[0].fused_backward_ns = 40;
  const ProblemGraph graph = BuildProblemGraph(problem);
  Schedule schedule = InOrder();
  schedule.ranks[0] = {At(StageKind::kForward, 0), At(StageKind::kBackward, 0)};
  const auto times = TimeSchedule(graph, schedule);
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_EQ(times->makespan_ns, 63);
  EXPECT_EQ(PeakBytes(graph, schedule)[0], 7);
  schedule.ranks[1] = {At(StageKind::kForward, 1), At(StageKind::kBackward, 1)};
  EXPECT_FALSE(TimeSchedule(graph, schedule).ok());
}

TEST(TimeScheduleTest, FindsDeadlockAndGaps) {
  const ProblemGraph graph = BuildProblemGraph(TwoRanks());
  Schedule schedule = InOrder();
  std::swap(schedule.ranks[0][0], schedule.ranks[0][1]);
  EXPECT_NE(TimeSchedule(graph, schedule).status().message().find("deadlock"),
            std::string::npos);
  schedule = InOrder();
  schedule.ranks[0].pop_back();
  EXPECT_FALSE(TimeSchedule(graph, schedule).ok());
  schedule = InOrder();
  schedule.ranks[0].push_back(schedule.ranks[0][0]);
  EXPECT_FALSE(TimeSchedule(graph, schedule).ok());
  schedule = InOrder();
  schedule.ranks[0][0].stage = 1;
  EXPECT_FALSE(TimeSchedule(graph, schedule).ok());
  schedule.ranks.pop_back();
  EXPECT_FALSE(TimeSchedule(graph, schedule).ok());
}

TEST(TimeScheduleTest, TimesPastTwoToThe63KeepTheirBits) {
  // Nine sweeps in a row between two ranks, transfers as long as they may be.
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {100, 100};
  for (int s = 0; s < 9; ++s) {
    Sweep sweep;
    sweep.id = std::to_string(s);
    if (s > 0) sweep.after = {s - 1};
    sweep.stages = {{.rank = s % 2,
                     .transfer_ns = kMostQuantity,
                     .choices = {MakeChoice(1, 1, 0, 1)}}};
    problem.sweeps.push_back(sweep);
  }
  ASSERT_TRUE(ValidateProblem(problem).ok());
  Schedule schedule;
  schedule.ranks.resize(2);
  for (int s = 0; s < 9; ++s) {
    schedule.ranks[s % 2].push_back({.kind = StageKind::kForward, .sweep = s});
  }
  for (int s = 8; s >= 0; --s) {
    schedule.ranks[s % 2].push_back({.kind = StageKind::kBackward, .sweep = s});
  }
  const ProblemGraph graph = BuildProblemGraph(problem);
  const auto times = TimeSchedule(graph, schedule);
  ASSERT_TRUE(times.ok()) << times.status();
  const uint64_t expected = 16 * static_cast<uint64_t>(kMostQuantity) + 18;
  EXPECT_EQ(static_cast<uint64_t>(times->makespan_ns), expected);
  EXPECT_EQ(static_cast<uint64_t>(LowerBound(graph)), expected);
}

// The backward of the first sweep waits for one consumer after the other, each
// on another rank than the one before.
TEST(TimeScheduleTest, ManyConsumersTakeNoLonger) {
  constexpr int kSweeps = 300'000;
  Problem problem;
  problem.ranks = 3;
  problem.memory_limit_bytes.assign(3, int64_t{1} << 40);
  Schedule schedule;
  schedule.ranks.resize(3);
  for (int s = 0; s < kSweeps; ++s) {
    Sweep& sweep = problem.sweeps.emplace_back();
    sweep.id = std::to_string(s);
    if (s > 0) sweep.after = {0};
    if (s > 0 && s + 1 < kSweeps) sweep.after.push_back(s + 1);
    sweep.stages = {
        {.rank = s == 0 ? 0 : 1 + s % 2, .choices = {MakeChoice(1, 1, 0, 1)}}};
  }
  schedule.ranks[0] = {{.kind = StageKind::kForward, .sweep = 0},
                       {.kind = StageKind::kBackward, .sweep = 0}};
  for (int s = kSweeps - 1; s > 0; --s) {
    schedule.ranks[1 + s % 2].push_back(
        {.kind = StageKind::kForward, .sweep = s});
  }
  for (int s = 1; s < kSweeps; ++s) {
    schedule.ranks[1 + s % 2].push_back(
        {.kind = StageKind::kBackward, .sweep = s});
  }
  const auto times = TimeSchedule(BuildProblemGraph(problem), schedule);
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_EQ(times->makespan_ns, 2 * kSweeps);
}

}  // namespace
}  // namespace pipeweaver::search
