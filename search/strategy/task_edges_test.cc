#include "search/strategy/task_edges.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {
namespace {

// Before, after, delay.
using Dependency = std::tuple<Task, Task, int64_t>;

Task F(int pair) { return 3 * pair + kForwardTask; }
Task G(int pair) { return 3 * pair + kGradientTask; }
Task W(int pair) { return 3 * pair + kWeightTask; }

Stage StageOf(int rank, int64_t weight_grad_ns, int64_t transfer_ns) {
  Choice choice;
  choice.forward_ns = choice.input_grad_ns = 10;
  choice.weight_grad_ns = weight_grad_ns;
  return Stage{rank, transfer_ns, {choice}};
}

TEST(TaskEdgesTest, BeforeAndAfterAreTheDependenciesBothWays) {
  Problem problem;
  problem.ranks = 2;
  problem.split_backward = true;
  problem.memory_limit_bytes = {100, 100};
  problem.sweeps.resize(3);
  // Pair 0 has no backward, 1 and 2 split theirs, 3 runs it whole.
  problem.sweeps[0].backward = false;
  problem.sweeps[0].stages = {StageOf(0, 10, 7)};
  problem.sweeps[1].after = {0};
  problem.sweeps[1].stages = {StageOf(1, 10, 5), StageOf(0, 10, 3)};
  problem.sweeps[2].after = {1, 0};
  problem.sweeps[2].stages = {StageOf(1, 0, 0)};
  const ProblemGraph graph = BuildProblemGraph(problem);
  ASSERT_EQ(graph.mode[3], PairMode::kWhole);

  std::vector<Dependency> expected = {
      {F(0), F(1), 7}, {F(1), F(2), 5}, {F(2), F(3), 3}, {F(0), F(3), 7},
      {F(1), G(1), 0}, {F(2), G(2), 0}, {F(3), G(3), 0}, {G(3), G(2), 3},
      {G(2), G(1), 5}, {G(1), W(1), 0}, {G(2), W(2), 0}};
  std::sort(expected.begin(), expected.end());

  const TaskEdges edges(graph);
  std::vector<Dependency> before, after;
  for (Task task = 0; task < 3 * graph.pairs; ++task) {
    for (const TaskEdge& edge : edges.before(task)) {
      before.emplace_back(edge.task, task, edge.delay_ns);
    }
    for (const TaskEdge& edge : edges.after(task)) {
      after.emplace_back(task, edge.task, edge.delay_ns);
    }
  }
  std::sort(before.begin(), before.end());
  std::sort(after.begin(), after.end());
  EXPECT_EQ(before, expected);
  EXPECT_EQ(after, expected);
}

}  // namespace
}  // namespace pipeweaver::search
