// Tests of bound.h: bounds worked out by hand. That they bound is tested
// against the exhaustive oracle, with the strategies.

#include "search/problem/bound.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "search/problem/problem_graph.h"

namespace pipeweaver::search {
namespace {

// `sweeps` of two or three ranks each, F of the given length, B twice that.
Problem Pipeline(int ranks, const std::vector<std::vector<int64_t>>& forwards) {
  Problem problem;
  problem.ranks = ranks;
  problem.memory_limit_bytes.assign(ranks, 1000);
  for (const std::vector<int64_t>& lengths : forwards) {
    Sweep sweep;
    sweep.id = std::to_string(problem.sweeps.size());
    for (size_t k = 0; k < lengths.size(); ++k) {
      Choice choice;
      choice.forward_ns = lengths[k];
      choice.input_grad_ns = 2 * lengths[k];
      sweep.stages.push_back(
          {.rank = static_cast<int>(k), .transfer_ns = 0, .choices = {choice}});
    }
    problem.sweeps.push_back(sweep);
  }
  return problem;
}

TEST(LowerBoundTest, HeadWorkAndTail) {
  const ProblemGraph graph =
      BuildProblemGraph(Pipeline(2, {{10, 10}, {10, 10}, {10, 10}}));
  // Rank 1: head 10, work 90, tail 20.
  EXPECT_EQ(LowerBound(graph), 120);
  EXPECT_EQ(FlowLowerBound(graph), 120);
}

TEST(LowerBoundTest, LongestPath) {
  EXPECT_EQ(LowerBound(BuildProblemGraph(Pipeline(3, {{10, 10, 10}}))), 90);
}

TEST(FlowLowerBoundTest, ShortSweepsInFrontDoNotFillThePipeline) {
  // A short encoder before each of two long sweeps.
  Problem problem = Pipeline(3, {{1, 1, 1}, {10, 10, 10}, {10, 10, 10}});
  problem.sweeps[1].after = {0};
  const ProblemGraph graph = BuildProblemGraph(problem);
  EXPECT_EQ(LowerBound(graph), 99);  // the longest path: 3 + 30 + 60 + 6
  // On rank 2, 63 of work; a long F comes there at 20 at the earliest, its B
  // ends 40 before the end.
  EXPECT_EQ(FlowLowerBound(graph), 20 + 63 + 40);

  Problem many = Pipeline(3, {{1, 1, 1},
                              {10, 10, 10},
                              {1, 1, 1},
                              {10, 10, 10},
                              {1, 1, 1},
                              {10, 10, 10}});
  for (const int s : {1, 3, 5}) many.sweeps[s].after = {s - 1};
  const ProblemGraph long_graph = BuildProblemGraph(many);
  // Rank 2: head 2, work 99, tail 4. But the long F come there at 20 at the
  // earliest, each short one in front makes that later by its own length; and
  // the long B, seen from the end, 40 before it.
  EXPECT_EQ(LowerBound(long_graph), 105);
  EXPECT_EQ(FlowLowerBound(long_graph), 159);
  const LowerBounds both = FindLowerBounds(long_graph);
  EXPECT_EQ(both.path_ns, 105);
  EXPECT_EQ(both.flow_ns, 159);
}

TEST(FlowLowerBoundTest, WhatFillsTheWaitForALongChainIsInItsWay) {
  // Rank 1 waits 10 for the long F, and rank 0 at the end 20 for the long B. Of
  // each short sweep, rank 1 can run F and B before the long F, which then
  // comes by the short F later: all four make the chain of 60 one of 64.
  const ProblemGraph graph = BuildProblemGraph(
      Pipeline(2, {{10, 10}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}));
  EXPECT_EQ(LowerBound(graph), 60);
  EXPECT_EQ(FlowLowerBound(graph), 64);
  // With a fifth, rank 1 has work of 45. Its wait for the long F could be
  // filled but for the 1 in which nothing can be there; then the end is not.
  const ProblemGraph more = BuildProblemGraph(
      Pipeline(2, {{10, 10}, {1, 1}, {1, 1}, {1, 1}, {1, 1}, {1, 1}}));
  EXPECT_EQ(FlowLowerBound(more), 66);
}

TEST(FlowLowerBoundTest, NoGroupFillsBothTheStartAndTheEnd) {
  // Rank 1 has work of 63. Before the first F of 9, B of the short group takes
  // 6 off the wait of 9; at the end, where the last B of 9 makes it wait for
  // 18, F of the short group would take 3 off.
  const ProblemGraph graph =
      BuildProblemGraph(Pipeline(2, {{9, 9}, {9, 9}, {3, 3}}));
  EXPECT_EQ(LowerBound(graph), 3 + 63 + 6);
  EXPECT_EQ(FlowLowerBound(graph), 3 + 63 + 18);
}

TEST(FlowLowerBoundTest, WhatFillsHasToGetThereBefore) {
  // Rank 1 has work of 87. With B of 2 and 8 before it, an F of 12 waits for 2;
  // so does F of 4, with B of 2 before it; F of 1 is there by then.
  const ProblemGraph graph =
      BuildProblemGraph(Pipeline(2, {{12, 12}, {12, 12}, {4, 4}, {1, 1}}));
  EXPECT_EQ(FlowLowerBound(graph), 2 + 87 + 24);
  // Without it, F of 4 waits for 4.
  const ProblemGraph less =
      BuildProblemGraph(Pipeline(2, {{12, 12}, {12, 12}, {4, 4}}));
  EXPECT_EQ(FlowLowerBound(less), 4 + 84 + 24);
}

TEST(FlowLowerBoundTest, SweepsOfAComponentWithTwoLastStagesFillByThemselves) {
  // Two short sweeps with a common encoder.
  Problem problem = Pipeline(2, {{1, 1}, {20, 20}, {20, 20}, {3, 3}, {3, 3}});
  problem.sweeps[3].after = {0};
  problem.sweeps[4].after = {0};
  const ProblemGraph graph = BuildProblemGraph(problem);
  // Rank 1 has work of 141. B of all three, 14, before the first F of 20 save
  // more than their F, 7, after the last B of 40.
  EXPECT_EQ(FlowLowerBound(graph), 20 - 14 + 141 + 40);
}

// Not rank by rank over all pairs: that would be minutes.
TEST(FlowLowerBoundTest, ManyRanksTakeNoLonger) {
  std::vector<std::vector<int64_t>> forwards(30);
  for (size_t i = 0; i < forwards.size(); ++i) {
    forwards[i].assign(4096, 1 + static_cast<int64_t>(i % 3));
  }
  const ProblemGraph graph = BuildProblemGraph(Pipeline(4096, forwards));
  const LowerBounds bounds = FindLowerBounds(graph);
  EXPECT_EQ(bounds.path_ns, 3 * 3 * 4096);  // the longest path
  // The last rank has work of 180, 9 of it in the longest chain. Of the rest,
  // it can run 60 while it waits for that chain: B of the sweeps that are
  // shorter.
  EXPECT_EQ(bounds.flow_ns, bounds.path_ns + 111);
}

// Not stage by stage from the first of a sweep on, which would take a minute.
TEST(FlowLowerBoundTest, LongSweepsTakeNoLonger) {
  constexpr int kStages = 200'000;
  Problem problem = Pipeline(4, {std::vector<int64_t>(kStages, 1)});
  for (int k = 0; k < kStages; ++k) problem.sweeps[0].stages[k].rank = k % 4;
  EXPECT_EQ(FlowLowerBound(BuildProblemGraph(problem)), 3 * kStages);
}

TEST(FlowLowerBoundTest, FindsTheLongSweepsAmongShortOnesOfEveryLength) {
  // 60 encoder sweeps of 60 lengths, then one long sweep for them all.
  std::vector<std::vector<int64_t>> forwards;
  for (int i = 1; i <= 60; ++i) forwards.push_back({i, i, i});
  forwards.push_back({1000, 1000, 1000});
  Problem problem = Pipeline(3, forwards);
  for (int i = 0; i < 60; ++i) problem.sweeps.back().after.push_back(i);
  const ProblemGraph graph = BuildProblemGraph(problem);
  // On rank 2, 3 * (1 + .. + 60) + 3000 of work; the long F comes there at 2000
  // at the earliest, its B, seen from the end, 4000 before.
  EXPECT_EQ(FlowLowerBound(graph), 2000 + 3 * 1830 + 3000 + 4000);
}

}  // namespace
}  // namespace pipeweaver::search
