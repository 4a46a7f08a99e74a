// Earliest and latest start times of orders.

#include "search/strategy/order_times.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/testing/random_models.h"

namespace pipeweaver::search {
namespace {

// A long sweep over ranks 0 and 1, pairs 0 and 1, and a short one on rank 0,
// pair 2.
ProblemGraph LongAndShort(int64_t limit_bytes) {
  const auto stage = [](int rank, int64_t forward_ns, int64_t backward_ns) {
    Choice choice;
    choice.forward_ns = forward_ns;
    choice.input_grad_ns = backward_ns;
    choice.activation_bytes = choice.backward_bytes = 1;
    return Stage{rank, 0, {choice}};
  };
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {limit_bytes, limit_bytes};
  problem.sweeps.resize(2);
  problem.sweeps[0].stages = {stage(0, 10, 20), stage(1, 10, 20)};
  problem.sweeps[1].stages = {stage(0, 5, 5)};
  return BuildProblemGraph(problem);
}

constexpr Task kLongForward = 0, kLongGradient = 1;
constexpr Task kShortForward = 6, kShortGradient = 7;

TaskOrder ShortInBetween() {
  TaskOrder order;
  order.tasks = {kLongForward, kShortForward, kShortGradient, 3, 4,
                 kLongGradient};
  order.ways.choice.assign(3, 0);
  order.ways.fused.assign(3, Ways::kApart);
  order.makespan_ns = 60;
  return order;
}

TEST(OrderTimesTest, WhatIsNotUrgentMovesToTheEnd) {
  const ProblemGraph graph = LongAndShort(2);
  OrderTimes times(graph);
  std::vector<int64_t> starts;
  times.Earliest(ShortInBetween(), starts);
  EXPECT_EQ(starts, (std::vector<int64_t>{0, 40, 0, 10, 20, 0, 10, 15, 0}));
  times.Latest(ShortInBetween(), starts);
  EXPECT_EQ(starts, (std::vector<int64_t>{0, 40, 0, 10, 20, 0, 30, 35, 0}));
}

TEST(OrderTimesTest, MemoryHoldsBackwardsBackInReversedTime) {
  const ProblemGraph graph = LongAndShort(1);
  OrderTimes times(graph);
  std::vector<int64_t> starts;
  times.Latest(ShortInBetween(), starts);
  // The short sweep comes before the long one.
  EXPECT_EQ(starts, (std::vector<int64_t>{10, 50, 0, 20, 30, 0, 0, 5, 0}));
}

TEST(OrderTimesTest, EarliestTimesAreTheScheduleAndLatestFollowDependencies) {
  ForEachRandomOrder([](const ProblemGraph& graph, const ListModel&,
                        const TaskOrder& order) {
    const auto times = TimeSchedule(graph, ToSchedule(graph, order));
    ASSERT_TRUE(times.ok());
    OrderTimes order_times(graph);
    std::vector<int64_t> earliest, latest;
    order_times.Earliest(order, earliest);
    order_times.Latest(order, latest);
    std::vector<size_t> next(graph.ranks, 0);
    for (const Task task : order.tasks) {
      const int r = graph.pair_rank[TaskPair(task)];
      EXPECT_EQ(earliest[task], times->ranks[r][next[r]].start_ns);
      ++next[r];
      EXPECT_GE(latest[task], 0);
    }
    for (int p = 0; p < graph.pairs; ++p) {
      const int64_t forward_ns =
          graph.choices_of(p)[order.ways.choice[p]].forward_ns;
      for (const GraphEdge& edge : graph.consumers_of(p)) {
        EXPECT_GE(latest[3 * edge.pair + kForwardTask],
                  latest[3 * p + kForwardTask] + forward_ns + edge.delay_ns);
      }
      if (!graph.has_backward(p)) continue;
      EXPECT_GE(latest[3 * p + kGradientTask],
                latest[3 * p + kForwardTask] + forward_ns);
    }
  });
}

}  // namespace
}  // namespace pipeweaver::search
