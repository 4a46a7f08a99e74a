// Tests of bubbles.h.

#include "search/problem/bubbles.h"

#include <gtest/gtest.h>

#include <string>

#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"

namespace pipeweaver::search {
namespace {

// Two sweeps over two ranks, rank 1 of less work, one activation at a time on
// rank 0.
Problem TwoSweeps(int64_t limit_bytes) {
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {limit_bytes, 100};
  for (int s = 0; s < 2; ++s) {
    Sweep sweep;
    sweep.id = std::to_string(s);
    for (int r = 0; r < 2; ++r) {
      Choice choice;
      choice.forward_ns = r == 0 ? 10 : 5;
      choice.input_grad_ns = r == 0 ? 20 : 10;
      choice.activation_bytes = choice.backward_bytes = 1;
      sweep.stages.push_back(
          {.rank = r, .transfer_ns = 2, .choices = {choice}});
    }
    problem.sweeps.push_back(sweep);
  }
  return problem;
}

ScheduledStage At(StageKind kind, int sweep, int stage) {
  return {.kind = kind, .sweep = sweep, .stage = stage};
}

TEST(AttributeBubblesTest, NamesEachCause) {
  Schedule schedule;
  for (int r = 0; r < 2; ++r) {
    schedule.ranks.push_back(
        {At(StageKind::kForward, 0, r), At(StageKind::kBackward, 0, r),
         At(StageKind::kForward, 1, r), At(StageKind::kBackward, 1, r)});
  }
  for (const bool lacks_memory : {true, false}) {
    const ProblemGraph graph =
        BuildProblemGraph(TwoSweeps(lacks_memory ? 1 : 2));
    const auto times = TimeSchedule(graph, schedule);
    ASSERT_TRUE(times.ok());
    ASSERT_EQ(times->makespan_ns, 98);
    const std::vector<Bubbles> bubbles =
        AttributeBubbles(graph, schedule, *times);
    // Rank 0 waits twice, 17 for rank 1 and 2 for the transfer. During the
    // first wait the other forward is there.
    EXPECT_EQ(bubbles[0].transfer_ns, 4);
    EXPECT_EQ(bubbles[0].memory_ns, lacks_memory ? 17 : 0);
    EXPECT_EQ(bubbles[0].dependency_ns, lacks_memory ? 17 : 34);
    EXPECT_EQ(bubbles[0].imbalance_ns, 0);
    // Rank 1 has 30 ns of work less.
    EXPECT_EQ(bubbles[1].transfer_ns, 4);
    EXPECT_EQ(bubbles[1].imbalance_ns, 30);
    EXPECT_EQ(bubbles[1].total_ns(), 98 - 30);
  }
}

}  // namespace
}  // namespace pipeweaver::search
