// Earliest and latest start times of an order; see order_times.h.

#include "search/strategy/order_times.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/first_of_least.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/task_edges.h"
#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
constexpr int kWordBits = 64;

int HighestBit(uint64_t word) { return std::bit_width(word) - 1; }

}  // namespace

struct OrderTimes::Later {
  bool operator()(const Arrival& a, const Arrival& b) const {
    return a.at_ns > b.at_ns;
  }
};

void OrderTimes::PlaceSet::Reset(int end) {
  words_.assign(end / kWordBits + 1, 0);
  summary_.assign(words_.size() / kWordBits + 1, 0);
  count_ = 0;
}

inline void OrderTimes::PlaceSet::Insert(int place) {
  const int word = place / kWordBits;
  words_[word] |= uint64_t{1} << (place % kWordBits);
  summary_[word / kWordBits] |= uint64_t{1} << (word % kWordBits);
  ++count_;
}

inline int OrderTimes::PlaceSet::Last() const {
  size_t at = summary_.size() - 1;
  while (summary_[at] == 0) --at;
  const int word = static_cast<int>(at) * kWordBits + HighestBit(summary_[at]);
  return word * kWordBits + HighestBit(words_[word]);
}

inline int OrderTimes::PlaceSet::TakeLast() {
  const int place = Last();
  const int word = place / kWordBits;
  words_[word] ^= uint64_t{1} << (place % kWordBits);
  if (words_[word] == 0) {
    summary_[word / kWordBits] ^= uint64_t{1} << (word % kWordBits);
  }
  --count_;
  return place;
}

OrderTimes::OrderTimes(const ProblemGraph& graph)
    : graph_(graph),
      edges_(graph),
      tasks_(3 * static_cast<size_t>(graph.pairs)),
      end_ns_(tasks_.size()),
      bytes_(graph.pairs),
      ranks_(graph.ranks),
      next_start_ns_(graph.ranks) {
  for (int p = 0; p < graph.pairs; ++p) {
    for (const int kind : {kForwardTask, kGradientTask, kWeightTask}) {
      const Task task = 3 * p + kind;
      tasks_[task].rank = graph.pair_rank[p];
      tasks_[task].first_waits = edges_.after(task).size();
    }
  }
}

void OrderTimes::SetWays(const Ways& ways) {
  for (int p = 0; p < graph_.pairs; ++p) {
    const GraphChoice& choice = graph_.choices_of(p)[ways.choice[p]];
    const bool splits = graph_.mode[p] == PairMode::kSplit && !IsFused(ways, p);
    tasks_[3 * p + kForwardTask].length_ns = choice.forward_ns;
    tasks_[3 * p + kGradientTask].length_ns =
        splits ? choice.input_grad_ns : choice.backward_ns;
    tasks_[3 * p + kWeightTask].length_ns = choice.weight_grad_ns;
    bytes_[p] = choice.activation_bytes;
  }
}

void OrderTimes::TimeOrder(const TaskOrder& order) {
  SetWays(order.ways);
  for (Rank& rank : ranks_) {
    rank.tasks.clear();
    rank.free_ns = 0;
  }
  for (const Task task : order.tasks) {
    TaskState& state = tasks_[task];
    Rank& rank = ranks_[state.rank];
    int64_t start_ns = rank.free_ns;
    for (const TaskEdge& edge : edges_.before(task)) {
      start_ns = std::max(start_ns, end_ns_[edge.task] + edge.delay_ns);
    }
    end_ns_[task] = rank.free_ns = start_ns + state.length_ns;
    state.place = static_cast<int32_t>(rank.tasks.size());
    rank.tasks.push_back(task);
  }
}

void OrderTimes::Earliest(const TaskOrder& order,
                          std::vector<int64_t>& starts) {
  TimeOrder(order);
  starts.assign(end_ns_.size(), 0);
  for (const Task task : order.tasks) {
    starts[task] = end_ns_[task] - tasks_[task].length_ns;
  }
  GiveFusedTheirs(order.ways, starts);
}

void OrderTimes::Holds(std::vector<int64_t>& hold_ns) const {
  hold_ns.assign(graph_.pairs, 0);
  for (int p = 0; p < graph_.pairs; ++p) {
    if (!graph_.has_backward(p)) continue;
    const Task forward = 3 * p + kForwardTask;
    hold_ns[p] = end_ns_[3 * p + kGradientTask] - end_ns_[forward] +
                 tasks_[forward].length_ns;
  }
}

void OrderTimes::GiveFusedTheirs(const Ways& ways,
                                 std::vector<int64_t>& starts) const {
  for (int p = 0; p < graph_.pairs; ++p) {
    if (IsFused(ways, p)) {
      starts[3 * p + kWeightTask] = starts[3 * p + kGradientTask];
    }
  }
}

inline void OrderTimes::Arrive(Task task) {
  const TaskState& state = tasks_[task];
  const int r = state.rank;
  Rank& rank = ranks_[r];
  const int64_t at_ns = state.may_run_ns;
  if (at_ns <= rank.free_ns) {
    rank.ready.Insert(state.place);
    next_start_ns_[r] = rank.free_ns;
    return;
  }
  rank.waiting.push_back({at_ns, task});
  std::push_heap(rank.waiting.begin(), rank.waiting.end(), Later());
  next_start_ns_[r] = std::min(next_start_ns_[r], at_ns);
}

// What was held is ready again, as far as there is room for its activations.
void OrderTimes::Admit(int r) {
  Rank& rank = ranks_[r];
  int64_t live_bytes = rank.live_bytes;
  while (!rank.held.empty()) {
    live_bytes += BytesOf(rank.tasks[rank.held.Last()]);
    if (live_bytes > graph_.limit_bytes[r]) return;
    rank.ready.Insert(rank.held.TakeLast());
  }
}

// When rank `r` can go on in reversed time; never when all that is left there
// is held.
inline void OrderTimes::UpdateNextStart(int r) {
  const Rank& rank = ranks_[r];
  if (!rank.ready.empty()) {
    next_start_ns_[r] = rank.free_ns;
  } else if (!rank.waiting.empty()) {
    next_start_ns_[r] = std::max(rank.free_ns, rank.waiting[0].at_ns);
  } else {
    next_start_ns_[r] = kNever;
  }
}

// Takes the most urgent of what memory does not admit, of ranks alike the
// first.
Task OrderTimes::TakeHeld() {
  Rank* most = nullptr;
  const auto end_ns = [this](const Rank& rank) {
    return end_ns_[rank.tasks[rank.held.Last()]];
  };
  for (Rank& rank : ranks_) {
    if (!rank.held.empty() &&
        (most == nullptr || end_ns(rank) > end_ns(*most))) {
      most = &rank;
    }
  }
  PW_CHECK(most != nullptr);
  return most->tasks[most->held.TakeLast()];
}

// Takes the most urgent of what may run on rank `r` at `at_ns`; -1 when memory
// does not admit it, so that it is held.
inline Task OrderTimes::TakeReady(int r, int64_t at_ns) {
  Rank& rank = ranks_[r];
  std::vector<Arrival>& waiting = rank.waiting;
  while (!waiting.empty() && waiting[0].at_ns <= at_ns) {
    rank.ready.Insert(tasks_[waiting[0].task].place);
    std::pop_heap(waiting.begin(), waiting.end(), Later());
    waiting.pop_back();
  }
  const int place = rank.ready.TakeLast();
  const Task task = rank.tasks[place];
  if (TaskKind(task) != kGradientTask ||
      rank.live_bytes + BytesOf(task) <= graph_.limit_bytes[r]) {
    return task;
  }
  rank.held.Insert(place);
  return -1;
}

void OrderTimes::Latest(const TaskOrder& order, std::vector<int64_t>& starts) {
  TimeOrder(order);
  for (TaskState& state : tasks_) {
    state.may_run_ns = 0;
    state.waits = state.first_waits;
  }
  for (int p = 0; p < graph_.pairs; ++p) {
    if (IsFused(order.ways, p)) --tasks_[3 * p + kGradientTask].waits;
  }
  for (Rank& rank : ranks_) {
    rank.free_ns = rank.live_bytes = 0;
    rank.ready.Reset(static_cast<int>(rank.tasks.size()));
    rank.held.Reset(static_cast<int>(rank.tasks.size()));
  }
  next_start_ns_.assign(graph_.ranks, kNever);
  for (const Task task : order.tasks) {
    if (tasks_[task].waits == 0) Arrive(task);
  }
  // At first, how long before the end of all a task starts.
  starts.assign(end_ns_.size(), 0);
  int64_t whole_ns = 0;
  for (size_t left = order.tasks.size(); left > 0;) {
    int r = FirstOfLeast(next_start_ns_);
    Task task = -1;
    if (next_start_ns_[r] == kNever) {
      task = TakeHeld();
      r = tasks_[task].rank;
    } else {
      task = TakeReady(r, next_start_ns_[r]);
      if (task < 0) {
        UpdateNextStart(r);
        continue;
      }
    }
    Rank& rank = ranks_[r];
    const int64_t end_ns = std::max(rank.free_ns, tasks_[task].may_run_ns) +
                           tasks_[task].length_ns;
    rank.free_ns = end_ns;
    starts[task] = end_ns;
    whole_ns = std::max(whole_ns, end_ns);
    if (TaskKind(task) == kGradientTask) {
      rank.live_bytes += BytesOf(task);
    } else if (TaskKind(task) == kForwardTask &&
               graph_.has_backward(TaskPair(task))) {
      rank.live_bytes -= BytesOf(task);
      Admit(r);
    }
    for (const TaskEdge& edge : edges_.before(task)) {
      TaskState& before = tasks_[edge.task];
      before.may_run_ns = std::max(before.may_run_ns, end_ns + edge.delay_ns);
      if (--before.waits == 0) Arrive(edge.task);
    }
    UpdateNextStart(r);
    --left;
  }
  for (const Task task : order.tasks) starts[task] = whole_ns - starts[task];
  GiveFusedTheirs(order.ways, starts);
}

}  // namespace pipeweaver::search
