// Each cause of idle time by a schedule that has it, and sums on random ones.

#include "search/plan/bubble_causes.h"

#include <random>

#include "gtest/gtest.h"
#include "search/plan/plan_checker.h"
#include "search/plan/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

constexpr auto F = StageKind::kForward;
constexpr auto B = StageKind::kBackward;

Choice MakeChoice(int64_t forward_ns, int64_t backward_ns) {
  Choice c;
  c.forward_ns = forward_ns;
  c.input_grad_ns = backward_ns;
  c.activation_bytes = c.backward_bytes = 1;
  return c;
}

// `sweeps` equal sweeps over ranks 0 and 1.
Problem TwoRanks(int sweeps, int64_t first_ns, int64_t second_ns,
                 int64_t transfer_ns) {
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {10, 10};
  for (int i = 0; i < sweeps; ++i) {
    Sweep sweep;
    sweep.stages = {{0, transfer_ns, {MakeChoice(first_ns, first_ns)}},
                    {1, transfer_ns, {MakeChoice(second_ns, second_ns)}}};
    problem.sweeps.push_back(sweep);
  }
  return problem;
}

BubbleCauses Causes(const Problem& problem, const Schedule& schedule) {
  const auto checked = CheckSchedule(problem, schedule);
  EXPECT_TRUE(checked.ok()) << checked.status();
  return FindBubbleCauses(BuildProblemGraph(problem), schedule, checked->times);
}

TEST(BubbleCausesTest, DependencyAndTransfer) {
  const Schedule schedule = {
      {{{F, 0, 0, 0}, {B, 0, 0, 0}}, {{F, 0, 1, 0}, {B, 0, 1, 0}}}};
  // F0 0-10, F1 13-23, B1 23-33, B0 36-46.
  const BubbleCauses causes = Causes(TwoRanks(1, 10, 10, 3), schedule);
  EXPECT_EQ(causes.imbalance_ns, 0);
  EXPECT_EQ(causes.memory_ns, 0);
  EXPECT_EQ(causes.transfer_ns, 3 + 3);
  EXPECT_EQ(causes.dependency_ns, (23 - 0) + 10 + 13);
}

TEST(BubbleCausesTest, Imbalance) {
  const Schedule schedule = {
      {{{F, 0, 0, 0}, {B, 0, 0, 0}}, {{F, 0, 1, 0}, {B, 0, 1, 0}}}};
  // Rank 1 has nothing to do at all.
  const BubbleCauses causes = Causes(TwoRanks(1, 10, 0, 0), schedule);
  EXPECT_EQ(causes.imbalance_ns, 20);
  EXPECT_EQ(causes.dependency_ns + causes.memory_ns + causes.transfer_ns, 0);
}

TEST(BubbleCausesTest, Memory) {
  // Room for one sweep on rank 0: its second forward waits for the backward.
  Problem problem = TwoRanks(2, 10, 10, 0);
  problem.memory_limit_bytes[0] = 1;
  const Schedule schedule = {
      {{{F, 0, 0, 0}, {B, 0, 0, 0}, {F, 1, 0, 0}, {B, 1, 0, 0}},
       {{F, 0, 1, 0}, {B, 0, 1, 0}, {F, 1, 1, 0}, {B, 1, 1, 0}}}};
  // Rank 0 idles from 10 to 30 with a forward at hand, and from 50 to 70.
  const BubbleCauses causes = Causes(problem, schedule);
  EXPECT_EQ(causes.memory_ns, 20);
  EXPECT_EQ(causes.dependency_ns, 20 + 40);
  problem.memory_limit_bytes[0] = 2;
  EXPECT_EQ(Causes(problem, schedule).memory_ns, 0);
}

TEST(BubbleCausesTest, SumsToAllIdleTime) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 300; ++i) {
    Problem problem = testing::RandomStepProblem(random).problem;
    const Schedule schedule = testing::RandomSchedule(problem, random);
    auto checked = CheckSchedule(problem, schedule);
    problem.memory_limit_bytes = checked->peak_bytes;
    int64_t idle = checked->times.makespan_ns * problem.ranks;
    for (const auto& rank : checked->times.ranks) {
      for (const auto& stage : rank) idle -= stage.end_ns - stage.start_ns;
    }
    const BubbleCauses c = Causes(problem, schedule);
    EXPECT_EQ(c.imbalance_ns + c.dependency_ns + c.memory_ns + c.transfer_ns,
              idle);
    EXPECT_GE(c.imbalance_ns, 0);
    EXPECT_GE(c.dependency_ns, 0);
    EXPECT_GE(c.memory_ns, 0);
    EXPECT_GE(c.transfer_ns, 0);
  }
}

}  // namespace
}  // namespace pipeweaver::search
