// Tests of safe_plan.h: what fits, what does not, and what the error says.

#include "search/strategy/safe_plan.h"

#include <gtest/gtest.h>

#include <string>
#include <utility>
#include <vector>

#include "search/problem/problem_graph.h"

namespace pipeweaver::search {
namespace {

Choice Bytes(int64_t activation, int64_t backward) {
  Choice choice;
  choice.forward_ns = choice.input_grad_ns = 1;
  choice.activation_bytes = activation;
  choice.backward_bytes = backward;
  return choice;
}

// Sweeps of one stage each on one rank.
Problem OneRank(int64_t limit_bytes, std::vector<std::vector<Choice>> choices,
                std::vector<std::vector<int>> after) {
  Problem problem;
  problem.ranks = 1;
  problem.memory_limit_bytes = {limit_bytes};
  for (size_t s = 0; s < choices.size(); ++s) {
    Sweep sweep;
    sweep.id = std::to_string(s);
    sweep.after = after[s];
    sweep.stages = {{.rank = 0, .choices = std::move(choices[s])}};
    problem.sweeps.push_back(std::move(sweep));
  }
  return problem;
}

std::string ErrorOf(const Problem& problem) {
  return std::string(
      FindSafePlan(BuildProblemGraph(problem)).status().message());
}

TEST(SafePlanTest, ComponentsFitOneByOne) {
  // Two components of 10 bytes each within 10.
  const auto plan = FindSafePlan(BuildProblemGraph(
      OneRank(10, {{Bytes(10, 10)}, {Bytes(10, 10)}}, {{}, {}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->components.size(), 2u);
}

TEST(SafePlanTest, AChainHoldsAllItsForwards) {
  EXPECT_EQ(ErrorOf(OneRank(10, {{Bytes(6, 6)}, {Bytes(5, 5)}}, {{}, {0}})),
            "no schedule exists: rank 0 would hold 11 bytes, its limit is 10");
  EXPECT_EQ(ErrorOf(OneRank(11, {{Bytes(6, 6)}, {Bytes(5, 5)}}, {{}, {0}})),
            "");
}

TEST(SafePlanTest, PicksChoicesByWhenTheirBackwardRuns) {
  // The lean choice needs 10 bytes in its backward: the first sweep's backward
  // runs when nothing else is held, the second's above the first's activation.
  const std::vector<Choice> choices = {Bytes(4, 4), Bytes(1, 10)};
  const auto plan = FindSafePlan(
      BuildProblemGraph(OneRank(10, {choices, choices}, {{}, {0}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->choice, (std::vector<int32_t>{1, 0}));
}

TEST(SafePlanTest, BranchesWhereTheOrderIsFree) {
  // Two producers of one sink; only with the second's backward first do lean
  // choices fit.
  const auto plan = FindSafePlan(BuildProblemGraph(
      OneRank(10, {{Bytes(3, 3)}, {Bytes(1, 8), Bytes(8, 8)}, {Bytes(1, 1)}},
              {{}, {}, {0, 1}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->components[0].forwards_first);
}

TEST(SafePlanTest, SeveralSinksMayTakeTurns) {
  // A producer of 4 bytes with two consumers of 6 each: not both at once.
  const auto plan = FindSafePlan(BuildProblemGraph(OneRank(
      10, {{Bytes(4, 4)}, {Bytes(6, 6)}, {Bytes(6, 6)}}, {{}, {0}, {0}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_FALSE(plan->components[0].forwards_first);
  EXPECT_EQ(plan->components[0].steps.size(), 6u);
  EXPECT_NE(ErrorOf(OneRank(9, {{Bytes(4, 4)}, {Bytes(6, 6)}, {Bytes(6, 6)}},
                            {{}, {0}, {0}}))
                .find("no schedule exists: rank 0"),
            std::string::npos);
}

// A producer of a byte with many consumers of a byte each, room for two.
TEST(SafePlanTest, ManyConsumersRunOneByOne) {
  constexpr int kSweeps = 20'000;
  std::vector<std::vector<Choice>> choices(kSweeps, {Bytes(1, 1)});
  std::vector<std::vector<int>> after(kSweeps, {0});
  after[0].clear();
  const auto plan = FindSafePlan(BuildProblemGraph(OneRank(2, choices, after)));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->components[0].steps.size(), 2u * kSweeps);
}

// Consumers that each need both halves of many producers, and a byte more than
// there is: no order of producers helps, and the search for one ends.
TEST(SafePlanTest, GivesUpOnWhatNoOrderSolves) {
  constexpr int kHalf = 1500;
  std::vector<std::vector<Choice>> choices(kHalf, {Bytes(1, 1)});
  std::vector<std::vector<int>> after(kHalf);
  std::vector<int> all;
  for (int i = 0; i < kHalf; ++i) all.push_back(i);
  for (int i = 0; i < 2; ++i) {
    choices.push_back({Bytes(kHalf, kHalf)});
    after.push_back(all);
  }
  EXPECT_NE(ErrorOf(OneRank(2 * kHalf - 1, choices, after)).find("rank 0"),
            std::string::npos);
}

TEST(SafePlanTest, RefusesMoreThanThereIsMemoryFor) {
  constexpr int kMany = 4097;
  Problem problem = OneRank(1, std::vector(kMany, std::vector{Bytes(1, 1)}),
                            std::vector<std::vector<int>>(kMany));
  problem.ranks = kMany;
  problem.memory_limit_bytes.assign(kMany, 1);
  EXPECT_EQ(ErrorOf(problem),
            "segments, ranks: 4097 groups of segments that hang together, "
            "times 4097 ranks: must be at most 16777216");
}

TEST(SafePlanTest, SweepsWithoutBackwardNeedOnlyTheirOwn) {
  Problem problem = OneRank(10, {{Bytes(10, 0)}, {Bytes(10, 10)}}, {{}, {0}});
  problem.sweeps[0].backward = false;
  EXPECT_EQ(ErrorOf(problem), "");
  problem.memory_limit_bytes = {9};
  EXPECT_EQ(ErrorOf(problem),
            "no schedule exists: rank 0 would hold 10 bytes, its limit is 9");
}

}  // namespace
}  // namespace pipeweaver::search
