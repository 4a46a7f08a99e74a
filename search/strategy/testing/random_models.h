// Random problems that have a schedule, ready to be scheduled.

#ifndef SEARCH_STRATEGY_TESTING_RANDOM_MODELS_H_
#define SEARCH_STRATEGY_TESTING_RANDOM_MODELS_H_

#include <gtest/gtest.h>

#include <cstdint>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
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

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_TESTING_RANDOM_MODELS_H_
