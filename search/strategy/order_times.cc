// Earliest and latest start times of an order; see order_times.h.

#include "search/strategy/order_times.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {

bool OrderTimes::Later(const Entry& a, const Entry& b) {
  return a.at_ns != b.at_ns ? a.at_ns > b.at_ns : a.task > b.task;
}

bool OrderTimes::LessUrgent(const Entry& a, const Entry& b) {
  return a.at_ns != b.at_ns ? a.at_ns < b.at_ns : a.task < b.task;
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

int64_t OrderTimes::LengthOf(const TaskOrder& order, Task task) const {
  const int pair = TaskPair(task);
  const GraphChoice& choice = graph_.choices_of(pair)[order.ways.choice[pair]];
  switch (TaskKind(task)) {
    case kForwardTask:
      return choice.forward_ns;
    case kGradientTask:
      return graph_.mode[pair] == PairMode::kSplit &&
                     order.ways.fused[pair] != Ways::kFused
                 ? choice.input_grad_ns
                 : choice.backward_ns;
    default:
      return choice.weight_grad_ns;
  }
}

void OrderTimes::TimeOrder(const TaskOrder& order) {
  end_ns_.assign(3 * static_cast<size_t>(graph_.pairs), 0);
  rank_free_.assign(graph_.ranks, 0);
  for (const Task task : order.tasks) {
    int64_t& free_ns = rank_free_[graph_.pair_rank[TaskPair(task)]];
    ForEachBefore(task, [&](Task before, int64_t delay_ns) {
      free_ns = std::max(free_ns, end_ns_[before] + delay_ns);
    });
    free_ns += LengthOf(order, task);
    end_ns_[task] = free_ns;
  }
}

void OrderTimes::Earliest(const TaskOrder& order,
                          std::vector<int64_t>& starts) {
  TimeOrder(order);
  starts.assign(end_ns_.size(), 0);
  for (const Task task : order.tasks) {
    starts[task] = end_ns_[task] - LengthOf(order, task);
  }
}

void OrderTimes::Arrive(Task task) {
  Heap& waiting = ranks_[graph_.pair_rank[TaskPair(task)]].waiting;
  waiting.push_back({may_run_ns_[task], task});
  std::push_heap(waiting.begin(), waiting.end(), Later);
}

// Takes back what was held, as far as there is room for its activations.
void OrderTimes::Admit(Rank& rank, const TaskOrder& order, int64_t at_ns) {
  int64_t live_bytes = rank.live_bytes;
  while (!rank.held.empty()) {
    const Task task = rank.held.front().task;
    const int pair = TaskPair(task);
    live_bytes +=
        graph_.choices_of(pair)[order.ways.choice[pair]].activation_bytes;
    if (live_bytes > graph_.limit_bytes[graph_.pair_rank[pair]]) return;
    std::pop_heap(rank.held.begin(), rank.held.end(), LessUrgent);
    rank.held.pop_back();
    may_run_ns_[task] = std::max(may_run_ns_[task], at_ns);
    Arrive(task);
  }
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
  // Until the end, how long before the end of all a task starts.
  starts.assign(end_ns_.size(), 0);
  int64_t whole_ns = 0;
  for (size_t to_do = order.tasks.size(); to_do > 0;) {
    Rank* first = nullptr;
    int64_t start_ns = 0;
    for (Rank& rank : ranks_) {
      if (rank.ready.empty() && rank.waiting.empty()) continue;
      const int64_t at_ns = rank.ready.empty()
                                ? std::max(rank.free_ns, rank.waiting[0].at_ns)
                                : rank.free_ns;
      if (first == nullptr || at_ns < start_ns) {
        first = &rank;
        start_ns = at_ns;
      }
    }
    const bool over_limit = first == nullptr;
    if (over_limit) {
      for (Rank& rank : ranks_) {
        if (!rank.held.empty() &&
            (first == nullptr || LessUrgent(first->held[0], rank.held[0]))) {
          first = &rank;
        }
      }
    }
    Rank& rank = *first;
    while (!rank.waiting.empty() && rank.waiting[0].at_ns <= start_ns) {
      const Task task = rank.waiting[0].task;
      std::pop_heap(rank.waiting.begin(), rank.waiting.end(), Later);
      rank.waiting.pop_back();
      rank.ready.push_back({end_ns_[task], task});
      std::push_heap(rank.ready.begin(), rank.ready.end(), LessUrgent);
    }
    Heap& from = over_limit ? rank.held : rank.ready;
    const Entry entry = from[0];
    std::pop_heap(from.begin(), from.end(), LessUrgent);
    from.pop_back();
    const Task task = entry.task;
    const int pair = TaskPair(task);
    const int64_t bytes =
        graph_.choices_of(pair)[order.ways.choice[pair]].activation_bytes;
    if (TaskKind(task) == kGradientTask) {
      if (!over_limit && rank.live_bytes + bytes >
                             graph_.limit_bytes[graph_.pair_rank[pair]]) {
        rank.held.push_back(entry);
        std::push_heap(rank.held.begin(), rank.held.end(), LessUrgent);
        continue;
      }
      rank.live_bytes += bytes;
    }
    rank.free_ns =
        std::max(rank.free_ns, may_run_ns_[task]) + LengthOf(order, task);
    starts[task] = rank.free_ns;
    whole_ns = std::max(whole_ns, rank.free_ns);
    if (TaskKind(task) == kForwardTask && graph_.has_backward(pair)) {
      rank.live_bytes -= bytes;
      Admit(rank, order, rank.free_ns);
    }
    ForEachBefore(task, [&](Task before, int64_t delay_ns) {
      may_run_ns_[before] =
          std::max(may_run_ns_[before], starts[task] + delay_ns);
      if (--waits_[before] == 0) Arrive(before);
    });
    --to_do;
  }
  for (const Task task : order.tasks) starts[task] = whole_ns - starts[task];
}

}  // namespace pipeweaver::search
