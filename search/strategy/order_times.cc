// Earliest and latest start times of an order; see order_times.h.

#include "search/strategy/order_times.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "semu/base/check.h"

namespace pipeweaver::search {

struct OrderTimes::Later {
  bool operator()(const Entry& a, const Entry& b) const {
    return a.at_ns != b.at_ns ? a.at_ns > b.at_ns : a.task > b.task;
  }
};

struct OrderTimes::LessUrgent {
  bool operator()(const Entry& a, const Entry& b) const {
    return a.at_ns != b.at_ns ? a.at_ns < b.at_ns : a.task < b.task;
  }
};

template <typename Less>
void OrderTimes::Put(Heap& heap, const Entry& entry) {
  heap.push_back(entry);
  std::push_heap(heap.begin(), heap.end(), Less());
}

template <typename Less>
Task OrderTimes::Take(Heap& heap) {
  const Task task = heap[0].task;
  std::pop_heap(heap.begin(), heap.end(), Less());
  heap.pop_back();
  return task;
}

template <typename Visitor>
void OrderTimes::ForEachBefore(Task task, const Visitor& visit) const {
  const int pair = TaskPair(task);
  switch (TaskKind(task)) {
    case kForwardTask:
      for (const GraphEdge& edge : graph_.producers_of(pair)) {
        visit(3 * edge.pair + kForwardTask, edge.delay_ns);
      }
      break;
    case kGradientTask:
      visit(3 * pair + kForwardTask, 0);
      for (const GraphEdge& edge : graph_.consumers_of(pair)) {
        visit(3 * edge.pair + kGradientTask, edge.delay_ns);
      }
      break;
    default:
      visit(3 * pair + kGradientTask, 0);
      break;
  }
}

int64_t OrderTimes::BytesOf(const TaskOrder& order, Task task) const {
  const int pair = TaskPair(task);
  return graph_.choices_of(pair)[order.ways.choice[pair]].activation_bytes;
}

int64_t OrderTimes::LimitOf(Task task) const {
  return graph_.limit_bytes[graph_.pair_rank[TaskPair(task)]];
}

void OrderTimes::TimeOrder(const TaskOrder& order) {
  end_ns_.assign(3 * static_cast<size_t>(graph_.pairs), 0);
  rank_free_.assign(graph_.ranks, 0);
  for (const Task task : order.tasks) {
    int64_t& free_ns = rank_free_[graph_.pair_rank[TaskPair(task)]];
    ForEachBefore(task, [&](Task before, int64_t delay_ns) {
      free_ns = std::max(free_ns, end_ns_[before] + delay_ns);
    });
    free_ns += TaskLength(graph_, order.ways, task);
    end_ns_[task] = free_ns;
  }
}

void OrderTimes::Earliest(const TaskOrder& order,
                          std::vector<int64_t>& starts) {
  TimeOrder(order);
  starts.assign(end_ns_.size(), 0);
  for (const Task task : order.tasks) {
    starts[task] = end_ns_[task] - TaskLength(graph_, order.ways, task);
  }
  GiveFusedTheirs(order, starts);
}

void OrderTimes::GiveFusedTheirs(const TaskOrder& order,
                                 std::vector<int64_t>& starts) const {
  for (int p = 0; p < graph_.pairs; ++p) {
    if (graph_.mode[p] == PairMode::kSplit &&
        order.ways.fused[p] == Ways::kFused) {
      starts[3 * p + kWeightTask] = starts[3 * p + kGradientTask];
    }
  }
}

void OrderTimes::Arrive(Task task) {
  Heap& waiting = ranks_[graph_.pair_rank[TaskPair(task)]].waiting;
  Put<Later>(waiting, {may_run_ns_[task], task});
}

// Takes back what was held, as far as there is room for its activations.
void OrderTimes::Admit(Rank& rank, const TaskOrder& order, int64_t at_ns) {
  int64_t live_bytes = rank.live_bytes;
  while (!rank.held.empty()) {
    const Task task = rank.held[0].task;
    live_bytes += BytesOf(order, task);
    if (live_bytes > LimitOf(task)) return;
    Take<LessUrgent>(rank.held);
    may_run_ns_[task] = std::max(may_run_ns_[task], at_ns);
    Arrive(task);
  }
}

// The rank that can go on first in reversed time, and when; none when all that
// is left is held.
std::pair<OrderTimes::Rank*, int64_t> OrderTimes::FirstRank() {
  std::pair<Rank*, int64_t> first = {nullptr, 0};
  for (Rank& rank : ranks_) {
    if (rank.ready.empty() && rank.waiting.empty()) continue;
    const int64_t at_ns = rank.ready.empty()
                              ? std::max(rank.free_ns, rank.waiting[0].at_ns)
                              : rank.free_ns;
    if (first.first == nullptr || at_ns < first.second) first = {&rank, at_ns};
  }
  return first;
}

// Takes the most urgent of what memory does not admit.
Task OrderTimes::TakeHeld() {
  Rank* most = nullptr;
  for (Rank& rank : ranks_) {
    if (!rank.held.empty() &&
        (most == nullptr || LessUrgent()(most->held[0], rank.held[0]))) {
      most = &rank;
    }
  }
  PW_CHECK(most != nullptr);
  return Take<LessUrgent>(most->held);
}

// Takes the most urgent of what may run on `rank` at `at_ns`; -1 when memory
// does not admit it, so that it is held.
Task OrderTimes::TakeReady(Rank& rank, const TaskOrder& order, int64_t at_ns) {
  while (!rank.waiting.empty() && rank.waiting[0].at_ns <= at_ns) {
    const Task task = Take<Later>(rank.waiting);
    Put<LessUrgent>(rank.ready, {end_ns_[task], task});
  }
  const Task task = Take<LessUrgent>(rank.ready);
  if (TaskKind(task) != kGradientTask ||
      rank.live_bytes + BytesOf(order, task) <= LimitOf(task)) {
    return task;
  }
  Put<LessUrgent>(rank.held, {end_ns_[task], task});
  return -1;
}

void OrderTimes::Latest(const TaskOrder& order, std::vector<int64_t>& starts) {
  TimeOrder(order);
  may_run_ns_.assign(end_ns_.size(), 0);
  waits_.assign(end_ns_.size(), 0);
  ranks_.resize(graph_.ranks);
  for (Rank& rank : ranks_) rank.free_ns = rank.live_bytes = 0;
  for (const Task task : order.tasks) {
    ForEachBefore(task, [this](Task before, int64_t) { ++waits_[before]; });
  }
  for (const Task task : order.tasks) {
    if (waits_[task] == 0) Arrive(task);
  }
  // At first, how long before the end of all a task starts.
  starts.assign(end_ns_.size(), 0);
  int64_t whole_ns = 0;
  for (size_t left = order.tasks.size(); left > 0;) {
    const auto [first, at_ns] = FirstRank();
    const Task task =
        first == nullptr ? TakeHeld() : TakeReady(*first, order, at_ns);
    if (task < 0) continue;
    Rank& rank = ranks_[graph_.pair_rank[TaskPair(task)]];
    rank.free_ns = std::max(rank.free_ns, may_run_ns_[task]) +
                   TaskLength(graph_, order.ways, task);
    starts[task] = rank.free_ns;
    whole_ns = std::max(whole_ns, rank.free_ns);
    if (TaskKind(task) == kGradientTask) {
      rank.live_bytes += BytesOf(order, task);
    } else if (TaskKind(task) == kForwardTask &&
               graph_.has_backward(TaskPair(task))) {
      rank.live_bytes -= BytesOf(order, task);
      Admit(rank, order, rank.free_ns);
    }
    ForEachBefore(task, [&](Task before, int64_t delay_ns) {
      may_run_ns_[before] =
          std::max(may_run_ns_[before], starts[task] + delay_ns);
      if (--waits_[before] == 0) Arrive(before);
    });
    --left;
  }
  for (const Task task : order.tasks) starts[task] = whole_ns - starts[task];
  GiveFusedTheirs(order, starts);
}

}  // namespace pipeweaver::search
