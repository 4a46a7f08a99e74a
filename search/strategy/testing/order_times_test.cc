// Earliest and latest start times of orders.

#include "search/strategy/order_times.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <utility>
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
    std::vector<int64_t> earliest, latest, hold_ns;
    order_times.Earliest(order, earliest);
    order_times.Latest(order, latest);
    order_times.Holds(hold_ns);
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
      if (!graph.has_backward(p)) {
        EXPECT_EQ(hold_ns[p], 0);
        continue;
      }
      const Task gradient = 3 * p + kGradientTask;
      EXPECT_EQ(hold_ns[p], earliest[gradient] +
                                TaskLength(graph, order.ways, gradient) -
                                earliest[3 * p + kForwardTask]);
      EXPECT_GE(latest[gradient], latest[3 * p + kForwardTask] + forward_ns);
    }
  });
}

// Latest, one stage after the other in the plainest way.
class PlainLatest {
 public:
  PlainLatest(const ProblemGraph& graph, const TaskOrder& order)
      : graph_(graph), order_(order), ranks_(graph.ranks) {
    OrderTimes(graph).Earliest(order, starts_);
    for (size_t i = 0; i < order.tasks.size(); ++i) {
      const Task task = order.tasks[i];
      place_[task] = i;
      for (const auto& [before, delay_ns] : Before(task)) ++waits_[before];
    }
    for (const Task task : order.tasks) {
      if (waits_[task] == 0) RankOf(task).free.push_back(task);
    }
  }

  std::vector<int64_t> Run() {
    for (size_t left = order_.tasks.size(); left > 0;) {
      const Task task = Next();
      if (task < 0) continue;
      --left;
      Rank& rank = RankOf(task);
      rank.end_ns = std::max(rank.end_ns, may_run_ns_[task]) +
                    TaskLength(graph_, order_.ways, task);
      ends_ns_[task] = rank.end_ns;
      whole_ns_ = std::max(whole_ns_, rank.end_ns);
      const int pair = TaskPair(task);
      if (TaskKind(task) == kGradientTask) rank.live_bytes += BytesOf(task);
      if (TaskKind(task) == kForwardTask && graph_.has_backward(pair)) {
        rank.live_bytes -= BytesOf(task);
        for (int64_t live_bytes = rank.live_bytes; !rank.held.empty();) {
          const auto most = MostUrgent(rank.held);
          live_bytes += BytesOf(*most);
          if (live_bytes > graph_.limit_bytes[graph_.pair_rank[pair]]) break;
          may_run_ns_[*most] = std::max(may_run_ns_[*most], rank.end_ns);
          rank.free.push_back(*most);
          rank.held.erase(most);
        }
      }
      for (const auto& [before, delay_ns] : Before(task)) {
        may_run_ns_[before] =
            std::max(may_run_ns_[before], rank.end_ns + delay_ns);
        if (--waits_[before] == 0) RankOf(before).free.push_back(before);
      }
    }
    std::vector<int64_t> starts(3 * graph_.pairs, 0);
    for (const Task task : order_.tasks) {
      starts[task] = whole_ns_ - ends_ns_[task];
    }
    for (int p = 0; p < graph_.pairs; ++p) {
      if (place_.contains(3 * p + kWeightTask)) continue;
      if (graph_.mode[p] != PairMode::kSplit) continue;
      starts[3 * p + kWeightTask] = starts[3 * p + kGradientTask];
    }
    return starts;
  }

 private:
  struct Rank {
    std::vector<Task> free, held;
    int64_t end_ns = 0, live_bytes = 0;
  };

  Rank& RankOf(Task task) { return ranks_[graph_.pair_rank[TaskPair(task)]]; }
  int64_t BytesOf(Task task) const {
    const int pair = TaskPair(task);
    return graph_.choices_of(pair)[order_.ways.choice[pair]].activation_bytes;
  }
  int64_t EndOf(Task task) const {
    return starts_[task] + TaskLength(graph_, order_.ways, task);
  }
  std::vector<Task>::iterator MostUrgent(std::vector<Task>& tasks) {
    return std::max_element(tasks.begin(), tasks.end(), [this](Task a, Task b) {
      return place_[a] < place_[b];
    });
  }

  // Takes a task; -1 where it is held instead.
  Task Next() {
    Rank* first = nullptr;
    int64_t first_ns = 0;
    for (Rank& rank : ranks_) {
      for (const Task task : rank.free) {
        const int64_t at_ns = std::max(rank.end_ns, may_run_ns_[task]);
        if (first == nullptr || at_ns < first_ns) {
          first = &rank;
          first_ns = at_ns;
        }
      }
    }
    if (first == nullptr) {
      for (Rank& rank : ranks_) {
        if (rank.held.empty()) continue;
        if (first == nullptr ||
            EndOf(*MostUrgent(rank.held)) > EndOf(*MostUrgent(first->held))) {
          first = &rank;
        }
      }
      return Take(first->held, *MostUrgent(first->held));
    }
    std::vector<Task> ready;
    for (const Task task : first->free) {
      if (may_run_ns_[task] <= first_ns) ready.push_back(task);
    }
    const Task task = Take(first->free, *MostUrgent(ready));
    if (TaskKind(task) != kGradientTask ||
        first->live_bytes + BytesOf(task) <=
            graph_.limit_bytes[graph_.pair_rank[TaskPair(task)]]) {
      return task;
    }
    first->held.push_back(task);
    return -1;
  }

  static Task Take(std::vector<Task>& from, Task task) {
    std::erase(from, task);
    return task;
  }

  // What `task` waits for, and the transfers.
  std::vector<std::pair<Task, int64_t>> Before(Task task) const {
    std::vector<std::pair<Task, int64_t>> before;
    const int pair = TaskPair(task);
    if (TaskKind(task) == kForwardTask) {
      for (const GraphEdge& edge : graph_.producers_of(pair)) {
        before.emplace_back(3 * edge.pair + kForwardTask, edge.delay_ns);
      }
    } else if (TaskKind(task) == kGradientTask) {
      before.emplace_back(3 * pair + kForwardTask, 0);
      for (const GraphEdge& edge : graph_.consumers_of(pair)) {
        before.emplace_back(3 * edge.pair + kGradientTask, edge.delay_ns);
      }
    } else {
      before.emplace_back(3 * pair + kGradientTask, 0);
    }
    return before;
  }

  const ProblemGraph& graph_;
  const TaskOrder& order_;
  std::vector<int64_t> starts_;  // of the order itself
  std::map<Task, size_t> place_;
  std::map<Task, int> waits_;
  std::map<Task, int64_t> may_run_ns_, ends_ns_;
  std::vector<Rank> ranks_;
  int64_t whole_ns_ = 0;
};

TEST(OrderTimesTest, LatestIsListSchedulingInReversedTime) {
  int fused = 0, moved = 0;
  ForEachRandomOrder([&](const ProblemGraph& graph, const ListModel& model,
                         const TaskOrder& order) {
    // One workspace for orders that are fused elsewhere.
    OrderTimes times(graph);
    std::vector<int64_t> latest;
    times.Latest(order, latest);
    EXPECT_EQ(latest, PlainLatest(graph, order).Run());
    for (const uint8_t way : {Ways::kEither, Ways::kApart}) {
      ListRule rule;
      rule.key = latest;
      Ways ways = order.ways;
      for (int p = 0; p < graph.pairs; ++p) {
        if (graph.mode[p] == PairMode::kSplit) ways.fused[p] = way;
      }
      TaskOrder next;
      ListScheduler(model).Run(rule, ways, next);
      times.Latest(next, latest);
      EXPECT_EQ(latest, PlainLatest(graph, next).Run());
      moved += next.tasks != order.tasks;
      fused += std::count(next.ways.fused.begin(), next.ways.fused.end(),
                          Ways::kFused) > 0;
    }
  });
  EXPECT_GT(moved, 20);
  EXPECT_GT(fused, 5);
}

TEST(OrderTimesTest, LatestOnOneRankWithManyStages) {
  for (const int sweeps : {32, 33, 2048, 2100}) {
    Problem problem;
    problem.ranks = 1;
    problem.memory_limit_bytes = {sweeps / 2};
    for (int s = 0; s < sweeps; ++s) {
      Choice choice;
      choice.forward_ns = 1 + s % 7;
      choice.input_grad_ns = 1 + s % 5;
      choice.activation_bytes = choice.backward_bytes = 1;
      problem.sweeps.emplace_back().stages = {Stage{0, 0, {choice}}};
    }
    const ProblemGraph graph = BuildProblemGraph(problem);
    TaskOrder order;
    order.ways.choice.assign(sweeps, 0);
    order.ways.fused.assign(sweeps, Ways::kApart);
    constexpr int kOpen = 8;
    for (int s = 0; s < sweeps + kOpen; ++s) {
      if (s < sweeps) order.tasks.push_back(3 * s + kForwardTask);
      if (s >= kOpen) order.tasks.push_back(3 * (s - kOpen) + kGradientTask);
    }
    std::vector<int64_t> latest;
    OrderTimes(graph).Latest(order, latest);
    EXPECT_EQ(latest, PlainLatest(graph, order).Run()) << sweeps;
  }
}

}  // namespace
}  // namespace pipeweaver::search
