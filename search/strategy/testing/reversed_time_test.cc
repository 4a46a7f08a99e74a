// Problems and orders in reversed time.

#include "search/strategy/reversed_time.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/memory_ways.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/testing/random_models.h"

namespace pipeweaver::search {
namespace {

// One sweep over two ranks. Its choices keep activations or, the second,
// rebuild them.
Problem TwoStages(bool may_rebuild) {
  Choice keep;
  keep.forward_ns = 10;
  keep.input_grad_ns = 15;
  keep.weight_grad_ns = 5;
  keep.activation_bytes = keep.backward_bytes = 400;
  Choice rebuild = keep;
  rebuild.input_grad_ns = 25;
  rebuild.activation_bytes = 100;
  rebuild.backward_bytes = 310;
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {4800, 9600};
  problem.sweeps.resize(1);
  for (int rank = 0; rank < 2; ++rank) {
    std::vector<Choice> choices = {keep};
    if (may_rebuild) choices.push_back(rebuild);
    problem.sweeps[0].stages.push_back({rank, 3, choices});
  }
  return problem;
}

TEST(ReversedTimeTest, ForwardsAndBackwardsChangePlaces) {
  const auto reversed =
      InReversedTime(BuildProblemGraph(TwoStages(/*may_rebuild=*/true)));
  ASSERT_TRUE(reversed.has_value());
  const GraphChoice& keep = reversed->choices_of(0)[0];
  EXPECT_EQ(keep.forward_ns, 20);
  EXPECT_EQ(keep.backward_ns, 10);
  EXPECT_EQ(keep.activation_bytes, 400);
  // The headroom is a 48th of the least limit, 100 bytes; the other 110 that
  // rebuilding takes count while the pair is held.
  const GraphChoice& rebuild = reversed->choices_of(0)[1];
  EXPECT_EQ(rebuild.forward_ns, 30);
  EXPECT_EQ(rebuild.activation_bytes, 210);
  EXPECT_EQ(rebuild.backward_bytes, 210);
  EXPECT_EQ(reversed->limit_bytes, (std::vector<int64_t>{4700, 9500}));
}

TEST(ReversedTimeTest, WhereNothingIsRebuiltLimitsStay) {
  const Problem problem = TwoStages(/*may_rebuild=*/false);
  const auto reversed = InReversedTime(BuildProblemGraph(problem));
  ASSERT_TRUE(reversed.has_value());
  EXPECT_EQ(reversed->limit_bytes, problem.memory_limit_bytes);
}

TEST(ReversedTimeTest, ARankWithoutStagesTakesNoHeadroomFromOthers) {
  Problem problem = TwoStages(/*may_rebuild=*/true);
  problem.ranks = 3;
  problem.memory_limit_bytes.push_back(0);
  const auto reversed = InReversedTime(BuildProblemGraph(problem));
  ASSERT_TRUE(reversed.has_value());
  EXPECT_EQ(reversed->limit_bytes, (std::vector<int64_t>{4700, 9500, 0}));
}

TEST(ReversedTimeTest, NeedsWholeBackwards) {
  Problem problem = TwoStages(/*may_rebuild=*/true);
  problem.split_backward = true;
  EXPECT_FALSE(InReversedTime(BuildProblemGraph(problem)).has_value());
  problem = TwoStages(/*may_rebuild=*/true);
  problem.sweeps[0].backward = false;
  EXPECT_FALSE(InReversedTime(BuildProblemGraph(problem)).has_value());
}

TEST(ReversedTimeTest, AnOrderReversedTwiceIsTheSame) {
  TaskOrder order;
  order.tasks = {0, 3, 4, 1};
  ReverseTime(order);
  EXPECT_EQ(order.tasks, (std::vector<Task>{0, 3, 4, 1}));
  order.tasks = {0, 3, 6, 7, 4, 1};
  ReverseTime(order);
  EXPECT_EQ(order.tasks, (std::vector<Task>{0, 3, 6, 7, 4, 1}));
  order.tasks = {0, 6, 3, 7, 4, 1};
  ReverseTime(order);
  EXPECT_EQ(order.tasks, (std::vector<Task>{0, 3, 6, 4, 7, 1}));
}

TEST(ReversedTimeTest, OrdersBuiltFromTheEndFitInTheirOwnTime) {
  int built = 0;
  ForEachRandomModel(400, [&](const ProblemGraph& graph, const SafePlan&,
                              const ListModel&) {
    const std::optional<ProblemGraph> reversed = InReversedTime(graph);
    if (!reversed) return;
    const auto plan = FindSafePlan(*reversed);
    if (!plan.ok()) return;
    ListRule rule;
    for (int t = 0; t < 3 * graph.pairs; ++t) rule.key.push_back(t * 7 % 5);
    TaskOrder order;
    ListScheduler(ListModel(*reversed, *plan))
        .Run(rule, MemoryPrices(*reversed).AllAt(HoldWeights(*reversed), 1e3),
             order);
    ReverseTime(order);
    ExpectConsistent(graph, order);
    ++built;
  });
  EXPECT_GT(built, 20);
}

}  // namespace
}  // namespace pipeweaver::search
