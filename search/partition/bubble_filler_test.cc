// Fillers run in the bubbles of an order that stays as it is.

#include "search/partition/bubble_filler.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/plan/plan_checker.h"

namespace pipeweaver::search {
namespace {

Stage OneStage(int rank, int64_t ns) {
  Choice choice;
  choice.forward_ns = choice.input_grad_ns = ns;
  choice.activation_bytes = choice.backward_bytes = 1;
  return {rank, 0, {choice}};
}

// Microbatches of an encoder and a backbone sweep over two ranks.
Problem TwoModules(int microbatches, int64_t encoder_ns) {
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {1000, 1000};
  for (int b = 0; b < microbatches; ++b) {
    for (const int64_t ns : {encoder_ns, int64_t{10}}) {
      Sweep& sweep = problem.sweeps.emplace_back();
      sweep.id = std::to_string(problem.sweeps.size());
      sweep.microbatch = b;
      sweep.stages = {OneStage(0, ns), OneStage(1, ns)};
    }
    problem.sweeps.back().after = {2 * b};
  }
  return problem;
}

// 1F1B of the backbone's sweeps.
Schedule BackboneOrder(int microbatches) {
  Schedule order;
  order.ranks.resize(2);
  for (int b = 0; b < microbatches; ++b) {
    const int sweep = 2 * b + 1;
    order.ranks[1].push_back({StageKind::kForward, sweep, 1, 0});
    order.ranks[1].push_back({StageKind::kBackward, sweep, 1, 0});
    order.ranks[0].push_back({StageKind::kForward, sweep, 0, 0});
    if (b > 0) {
      order.ranks[0].push_back({StageKind::kBackward, sweep - 2, 0, 0});
    }
  }
  order.ranks[0].push_back({StageKind::kBackward, 2 * microbatches - 1, 0, 0});
  return order;
}

TEST(FillBubblesTest, KeepsTheOrderAndIsValid) {
  const Problem problem = TwoModules(6, 3);
  const ProblemGraph graph = BuildProblemGraph(problem);
  const Schedule order = BackboneOrder(6);
  for (const bool backward_first : {false, true}) {
    for (const bool waits : {false, true}) {
      const auto filled =
          FillBubbles(problem, graph, order, {6, backward_first, waits});
      ASSERT_TRUE(filled.has_value());
      const auto checked = CheckSchedule(problem, *filled);
      EXPECT_TRUE(checked.ok()) << checked.status();
      for (int r = 0; r < 2; ++r) {
        std::vector<std::pair<int, StageKind>> expected, kept;
        for (const ScheduledStage& stage : order.ranks[r]) {
          expected.emplace_back(stage.sweep, stage.kind);
        }
        for (const ScheduledStage& stage : filled->ranks[r]) {
          if (stage.sweep % 2 == 1) kept.emplace_back(stage.sweep, stage.kind);
        }
        EXPECT_EQ(kept, expected);
      }
    }
  }
}

TEST(FillBubblesTest, WaitingFillersDoNotDelayTheOrder) {
  // Rank 1 is free until 10; the filler takes 20.
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {1000, 1000};
  problem.sweeps.resize(2);
  for (Sweep& sweep : problem.sweeps) sweep.backward = false;
  problem.sweeps[0].stages = {OneStage(0, 5), OneStage(1, 5)};
  problem.sweeps[0].stages[0].transfer_ns = 5;
  problem.sweeps[1].stages = {OneStage(1, 20)};
  Schedule order;
  order.ranks = {{{StageKind::kForward, 0, 0, 0}},
                 {{StageKind::kForward, 0, 1, 0}}};
  const ProblemGraph graph = BuildProblemGraph(problem);
  for (const bool waits : {false, true}) {
    const auto filled = FillBubbles(problem, graph, order, {1, false, waits});
    ASSERT_TRUE(filled.has_value());
    ASSERT_EQ(filled->ranks[1].size(), 2);
    EXPECT_EQ(filled->ranks[1][waits ? 0 : 1].sweep, 0);
  }
}

TEST(FillBubblesTest, FewerBegunHoldLess) {
  const Problem problem = TwoModules(8, 1);
  const ProblemGraph graph = BuildProblemGraph(problem);
  std::vector<int64_t> peaks;
  for (const int begun : {2, 8}) {
    const auto filled =
        FillBubbles(problem, graph, BackboneOrder(8), {begun, false, false});
    ASSERT_TRUE(filled.has_value()) << begun;
    peaks.push_back(CheckSchedule(problem, *filled)->peak_bytes[1]);
  }
  EXPECT_LT(peaks[0], peaks[1]);
}

TEST(FillBubblesTest, NoneWhereTheOrderNeedsMoreBegun) {
  // 1F1B's first rank starts two microbatches before its first backward.
  const Problem problem = TwoModules(4, 1);
  const ProblemGraph graph = BuildProblemGraph(problem);
  EXPECT_EQ(FillBubbles(problem, graph, BackboneOrder(4), {1, false, false}),
            std::nullopt);
}

}  // namespace
}  // namespace pipeweaver::search
