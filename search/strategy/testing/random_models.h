// Random problems that have a schedule, ready to be scheduled, and orders of
// them.

#ifndef SEARCH_STRATEGY_TESTING_RANDOM_MODELS_H_
#define SEARCH_STRATEGY_TESTING_RANDOM_MODELS_H_

#include <gtest/gtest.h>

#include <cstdint>

#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "search/problem/timing.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/memory_ways.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/testing/random_problem.h"

namespace pipeweaver::search {

// Calls visit(graph, plan, model) for those of the random problems of seeds 1
// .. `seeds` that fit in memory, until one fails fatally. At least a third
// must.
template <typename Visitor>
void ForEachRandomModel(uint64_t seeds, const Visitor& visit) {
  uint64_t visited = 0;
  for (uint64_t seed = 1; seed <= seeds; ++seed) {
    RandomProblemOptions shape;
    shape.most_pairs = 30;
    const ProblemGraph graph = BuildProblemGraph(RandomProblem(seed, shape));
    const auto plan = FindSafePlan(graph);
    if (!plan.ok()) continue;
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    visit(graph, *plan, ListModel(graph, *plan));
    if (testing::Test::HasFatalFailure()) return;
    ++visited;
  }
  EXPECT_GT(visited, seeds / 3);
}

// The order is complete, within memory, and as long as it says.
inline void ExpectConsistent(const ProblemGraph& graph,
                             const TaskOrder& order) {
  const Schedule schedule = ToSchedule(graph, order);
  const auto times = TimeSchedule(graph, schedule);
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_EQ(times->makespan_ns, order.makespan_ns);
  const absl::Status fits = CheckMemory(graph, schedule);
  EXPECT_TRUE(fits.ok()) << fits;
}

// Calls visit(graph, model, order) with leanly run list schedules of random
// problems.
template <typename Visitor>
void ForEachRandomOrder(const Visitor& visit) {
  constexpr uint64_t kSeeds = 60;
  ForEachRandomModel(kSeeds, [&](const ProblemGraph& graph, const SafePlan&,
                                 const ListModel& model) {
    ListRule rule;
    for (int t = 0; t < 3 * graph.pairs; ++t) rule.key.push_back(t);
    TaskOrder order;
    ListScheduler(model).Run(
        rule, MemoryPrices(graph).AllAt(HoldWeights(graph), 1e9), order);
    ExpectConsistent(graph, order);
    visit(graph, model, order);
  });
}

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_TESTING_RANDOM_MODELS_H_
