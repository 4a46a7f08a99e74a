// ListScheduler and the way from schedules back to orders, on random problems.

#include "search/strategy/list_scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/memory_ways.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/testing/random_models.h"

namespace pipeweaver::search {
namespace {

constexpr uint64_t kSeeds = 60;
constexpr int64_t kEndless = std::numeric_limits<int64_t>::max();

// Calls visit(graph, plan, model, rule, ways) for random problems, with a rule
// that runs tasks by number and ways that hold little.
template <typename Visitor>
void ForEachProblem(const Visitor& visit) {
  ForEachRandomModel(kSeeds, [&](const ProblemGraph& graph,
                                 const SafePlan& plan, const ListModel& model) {
    ListRule rule;
    for (int t = 0; t < 3 * graph.pairs; ++t) rule.key.push_back(t);
    visit(graph, plan, model, rule,
          MemoryPrices(graph).AllAt(HoldWeights(graph), 1e9));
  });
}

TEST(ListSchedulerTest, GivesUpOnlyWhatIsNotWorthIt) {
  ForEachProblem([](const ProblemGraph& graph, const SafePlan&,
                    const ListModel& model, const ListRule& rule,
                    const Ways& ways) {
    ListScheduler scheduler(model);
    TaskOrder whole, order;
    scheduler.Run(rule, ways, whole);
    scheduler.Run(rule, ways, order, whole.makespan_ns);
    EXPECT_EQ(order.tasks, whole.tasks);
    EXPECT_EQ(order.makespan_ns, whole.makespan_ns);
    // A rank ends last, so it shows at the latest with its last stage.
    scheduler.Run(rule, ways, order, whole.makespan_ns - 1);
    EXPECT_TRUE(order.tasks.empty());
    EXPECT_EQ(order.makespan_ns, kEndless);
    EXPECT_GT(graph.pairs, 0);
  });
}

TEST(ListSchedulerTest, NoComponentBeginsWhileOpenWorkIsAtItsLimit) {
  bool several = false;
  ForEachProblem([&several](const ProblemGraph& graph, const SafePlan& plan,
                            const ListModel& model, ListRule rule,
                            const Ways& ways) {
    const int components = static_cast<int>(plan.components.size());
    for (const int64_t limit : {int64_t{1}, 2 * model.component_work_ns(0)}) {
      rule.open_work_ns = std::max<int64_t>(1, limit);
      TaskOrder order;
      ListScheduler(model).Run(rule, ways, order);
      ASSERT_TRUE(TimeSchedule(graph, ToSchedule(graph, order)).ok());
      EXPECT_TRUE(CheckMemory(graph, ToSchedule(graph, order)).ok());
      std::vector<int> backwards_left(components, 0);
      for (int p = 0; p < graph.pairs; ++p) {
        const int c = plan.component_of_sweep[graph.pair_sweep[p]];
        if (c >= 0 && graph.has_backward(p)) ++backwards_left[c];
      }
      std::set<int> open;
      int64_t open_work_ns = 0;
      for (const Task task : order.tasks) {
        const int c = plan.component_of_sweep[graph.pair_sweep[TaskPair(task)]];
        if (c < 0) continue;
        if (TaskKind(task) == kForwardTask && open.count(c) == 0) {
          EXPECT_LT(open_work_ns, rule.open_work_ns);
          open.insert(c);
          open_work_ns += model.component_work_ns(c);
          several = several || open.size() > 1;
        }
        if (TaskKind(task) == kGradientTask && --backwards_left[c] == 0) {
          open.erase(c);
          open_work_ns -= model.component_work_ns(c);
        }
      }
    }
  });
  EXPECT_TRUE(several);
}

// `sweeps` of one stage of a byte and a nanosecond each, dealt out over ranks.
Problem SingleStages(int ranks, int sweeps) {
  Problem problem;
  problem.ranks = ranks;
  problem.memory_limit_bytes.assign(ranks, 1);
  Choice choice;
  choice.forward_ns = choice.input_grad_ns = 1;
  choice.activation_bytes = choice.backward_bytes = 1;
  const ChoiceList choices(std::vector<Choice>{choice});
  for (int s = 0; s < sweeps; ++s) {
    Sweep& sweep = problem.sweeps.emplace_back();
    sweep.id = std::to_string(s);
    sweep.stages = {{.rank = s % ranks, .choices = choices}};
  }
  return problem;
}

// Ranks wait for what would be delayed, however short stages are.
TEST(ListSchedulerTest, WaitsForStagesOfLessKeyAsLongAsPatienceSays) {
  for (const int64_t unit_ns : {1, 1000}) {
    // On rank 1, the second sweep's F of 4 is there at once, the first one's F
    // at 1 or 3.
    for (const int arrival : {1, 3}) {
      Problem problem = SingleStages(2, 2);
      problem.memory_limit_bytes = {2, 2};
      const auto stage = [unit_ns](int rank, int64_t length) {
        Choice choice;
        choice.forward_ns = choice.input_grad_ns = length * unit_ns;
        choice.activation_bytes = choice.backward_bytes = 1;
        return Stage{.rank = rank,
                     .transfer_ns = 0,
                     .choices = ChoiceList(std::vector<Choice>{choice})};
      };
      problem.sweeps[0].stages = {stage(0, arrival), stage(1, 1)};
      problem.sweeps[1].stages = {stage(1, 4)};
      const ProblemGraph graph = BuildProblemGraph(problem);
      const auto plan = FindSafePlan(graph);
      ASSERT_TRUE(plan.ok());
      const ListModel model(graph, *plan);
      ListRule rule;
      for (int t = 0; t < 3 * graph.pairs; ++t) rule.key.push_back(t);
      Ways ways;
      ways.choice.assign(graph.pairs, 0);
      ways.fused.assign(graph.pairs, Ways::kApart);
      for (const int patience : {0, 128}) {
        SCOPED_TRACE(testing::Message()
                     << unit_ns << " " << arrival << " " << patience);
        rule.patience = patience;
        TaskOrder order;
        ListScheduler(model).Run(rule, ways, order);
        const auto first_on_rank_1 = std::find_if(
            order.tasks.begin(), order.tasks.end(),
            [&](Task t) { return graph.pair_rank[TaskPair(t)] == 1; });
        // Half of 4 is more than 1 and less than 3.
        const bool waits = patience > 0 && arrival == 1;
        EXPECT_EQ(TaskPair(*first_on_rank_1), waits ? 1 : 2);
      }
    }
  }
}

// Two sweeps of one stage on one rank, each of 1 ns forwards and backwards.
TEST(ListSchedulerTest, ForwardsThatAreHeldBackLeaveTheirRankToOthers) {
  Problem problem = SingleStages(1, 2);
  problem.memory_limit_bytes = {2};
  const ProblemGraph graph = BuildProblemGraph(problem);
  const auto plan = FindSafePlan(graph);
  ASSERT_TRUE(plan.ok());
  const ListModel model(graph, *plan);
  Ways ways;
  ways.choice.assign(graph.pairs, 0);
  ways.fused.assign(graph.pairs, Ways::kApart);
  const auto run = [&](int64_t not_before_ns) {
    ListRule rule;
    // Forwards before backwards.
    rule.key = {0, 2, 0, 1, 3, 0};
    rule.not_before_ns = {0, not_before_ns};
    TaskOrder order;
    ListScheduler(model).Run(rule, ways, order);
    EXPECT_EQ(order.makespan_ns, 4);
    return order.tasks;
  };
  EXPECT_EQ(run(0), (std::vector<Task>{0, 3, 1, 4}));
  EXPECT_EQ(run(1), (std::vector<Task>{0, 3, 1, 4}));
  EXPECT_EQ(run(2), (std::vector<Task>{0, 1, 3, 4}));
  // The rank idles until then, the schedule does not.
  EXPECT_EQ(run(1000), (std::vector<Task>{0, 1, 3, 4}));
}

TEST(ListSchedulerTest, WhateverIsHeldBackAllIsScheduled) {
  std::mt19937_64 random(1);
  ForEachProblem([&](const ProblemGraph& graph, const SafePlan&,
                     const ListModel& model, ListRule rule, const Ways& ways) {
    for (int i = 0; i < 10; ++i) {
      rule.patience = i % 2 == 0 ? 0 : 128;
      rule.not_before_ns.clear();
      for (int p = 0; p < graph.pairs; ++p) {
        rule.not_before_ns.push_back(static_cast<int64_t>(random() % 1000) -
                                     300);
      }
      TaskOrder order;
      ListScheduler(model).Run(rule, ways, order);
      ExpectConsistent(graph, order);
    }
  });
}

TEST(ListModelTest, HasCellsOnlyWhereComponentsStand) {
  const ProblemGraph graph = BuildProblemGraph(SingleStages(1000, 17'000));
  const auto plan = FindSafePlan(graph);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const ListModel model(graph, *plan);
  EXPECT_EQ(model.cells(), 17'000);
  EXPECT_EQ(model.cell_rank(model.cell_of(16'999)), 999);
}

// A chain of sweeps without a backward, each with a sweep that waits for it,
// takes time and memory by its length, not by its square.
TEST(ListSchedulerTest, ChainsOfFrozenSweepsMayBeLong) {
  constexpr int kLength = 60'000;
  Problem problem = SingleStages(2, 2 * kLength);
  for (int i = 0; i < kLength; ++i) {
    Sweep& frozen = problem.sweeps[i];
    frozen.backward = false;
    if (i > 0) frozen.after = {i - 1};
    problem.sweeps[kLength + i].after = {i};
  }
  const ProblemGraph graph = BuildProblemGraph(problem);
  const auto plan = FindSafePlan(graph);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const ListModel model(graph, *plan);
  ListRule rule;
  for (int t = 0; t < 3 * graph.pairs; ++t) rule.key.push_back(t);
  TaskOrder order;
  ListScheduler(model).Run(
      rule, MemoryPrices(graph).AllAt(HoldWeights(graph), 0), order);
  ASSERT_EQ(order.tasks.size(), 3u * kLength);
  EXPECT_TRUE(CheckMemory(graph, ToSchedule(graph, order)).ok());
}

// Stages that become ready together, forwards by the hundred thousand behind
// one sweep and gradients before one, run by key, and take no quadratic time.
TEST(ListSchedulerTest, FanOutsMayBeWide) {
  constexpr int kWidth = 200'000;
  Problem problem = SingleStages(/*ranks=*/2, kWidth + 2);
  problem.memory_limit_bytes.assign(2, kWidth);
  auto& last_after = problem.sweeps[kWidth + 1].after;
  for (int s = 1; s <= kWidth; ++s) {
    problem.sweeps[s].after = {0};
    last_after.push_back(s);
  }
  const ProblemGraph graph = BuildProblemGraph(problem);
  const auto plan = FindSafePlan(graph);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const ListModel model(graph, *plan);
  ListRule rule;
  for (int t = 0; t < 3 * graph.pairs; ++t) rule.key.push_back(-t);
  TaskOrder order;
  ListScheduler(model).Run(
      rule, MemoryPrices(graph).AllAt(HoldWeights(graph), 0), order);
  ASSERT_EQ(order.tasks.size(), 2u * graph.pairs);
  std::vector<int> last(3 * graph.ranks, kWidth + 1);  // of each rank and kind
  for (const Task task : order.tasks) {
    const int pair = TaskPair(task);
    if (pair == 0 || pair > kWidth || TaskKind(task) == kWeightTask) continue;
    int& before = last[3 * graph.pair_rank[pair] + TaskKind(task)];
    ASSERT_LT(pair, before);
    before = pair;
  }
}

TEST(FromScheduleTest, TakesBackWhatToScheduleGives) {
  ForEachProblem([](const ProblemGraph& graph, const SafePlan&,
                    const ListModel& model, const ListRule& rule,
                    const Ways& ways) {
    TaskOrder order;
    ListScheduler(model).Run(rule, ways, order);
    const Schedule schedule = ToSchedule(graph, order);
    const std::optional<TaskOrder> back = FromSchedule(graph, schedule);
    ASSERT_TRUE(back.has_value());
    EXPECT_EQ(back->makespan_ns, order.makespan_ns);
    EXPECT_EQ(back->tasks.size(), order.tasks.size());
    const auto times = TimeSchedule(graph, ToSchedule(graph, *back));
    ASSERT_TRUE(times.ok()) << times.status();
    EXPECT_EQ(times->makespan_ns, order.makespan_ns);
  });
}

TEST(FromScheduleTest, TakesNothingElse) {
  ForEachProblem([](const ProblemGraph& graph, const SafePlan&,
                    const ListModel& model, const ListRule& rule,
                    const Ways& ways) {
    TaskOrder order;
    ListScheduler(model).Run(rule, ways, order);
    Schedule missing = ToSchedule(graph, order);
    for (auto& row : missing.ranks) {
      if (!row.empty()) row.pop_back();
    }
    EXPECT_FALSE(FromSchedule(graph, missing).has_value());
    EXPECT_FALSE(FromSchedule(graph, Schedule{}).has_value());
    // Over memory.
    ProblemGraph starved = graph;
    for (int64_t& limit : starved.limit_bytes) limit = -1;
    EXPECT_FALSE(FromSchedule(starved, ToSchedule(graph, order)).has_value());
  });
}

}  // namespace
}  // namespace pipeweaver::search
