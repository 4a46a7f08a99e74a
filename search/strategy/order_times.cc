// Earliest and latest start times of an order; see order_times.h.

#include "search/strategy/order_times.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
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

void OrderTimes::PlaceSet::Insert(int place) {
  const int word = place / kWordBits;
  words_[word] |= uint64_t{1} << (place % kWordBits);
  summary_[word / kWordBits] |= uint64_t{1} << (word % kWordBits);
  ++count_;
}

int OrderTimes::PlaceSet::Last() const {
  size_t at = summary_.size() - 1;
  while (summary_[at] == 0) --at;
  const int word = static_cast<int>(at) * kWordBits + HighestBit(summary_[at]);
  return word * kWordBits + HighestBit(words_[word]);
}

int OrderTimes::PlaceSet::TakeLast() {
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
      length_ns_(3 * static_cast<size_t>(graph.pairs)),
      place_(length_ns_.size()),
      first_waits_(length_ns_.size(), 0),
      ranks_(graph.ranks),
      next_start_ns_(graph.ranks) {
  for (int p = 0; p < graph.pairs; ++p) {
    const auto count = [this](Task before, int64_t) { ++first_waits_[before]; };
    ForEachBefore(3 * p + kForwardTask, count);
    if (graph.has_backward(p)) ForEachBefore(3 * p + kGradientTask, count);
    if (graph.mode[p] == PairMode::kSplit) {
      ForEachBefore(3 * p + kWeightTask, count);
    }
  }
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

void OrderTimes::TimeOrder(const TaskOrder& order) {
  end_ns_.assign(length_ns_.size(), 0);
  for (Rank& rank : ranks_) {
    rank.tasks.clear();
    rank.free_ns = 0;
  }
  for (const Task task : order.tasks) {
    Rank& rank = ranks_[RankOf(task)];
    int64_t start_ns = rank.free_ns;
    ForEachBefore(task, [&](Task before, int64_t delay_ns) {
      start_ns = std::max(start_ns, end_ns_[before] + delay_ns);
    });
    length_ns_[task] = TaskLength(graph_, order.ways, task);
    end_ns_[task] = rank.free_ns = start_ns + length_ns_[task];
    place_[task] = static_cast<int32_t>(rank.tasks.size());
    rank.tasks.push_back(task);
  }
}

void OrderTimes::Earliest(const TaskOrder& order,
                          std::vector<int64_t>& starts) {
  TimeOrder(order);
  starts.assign(end_ns_.size(), 0);
  for (const Task task : order.tasks) {
    starts[task] = end_ns_[task] - length_ns_[task];
  }
  GiveFusedTheirs(order, starts);
}

void OrderTimes::Holds(const TaskOrder& order, std::vector<int64_t>& hold_ns) {
  TimeOrder(order);
  hold_ns.assign(graph_.pairs, 0);
  for (int p = 0; p < graph_.pairs; ++p) {
    if (!graph_.has_backward(p)) continue;
    const Task forward = 3 * p + kForwardTask;
    hold_ns[p] =
        end_ns_[3 * p + kGradientTask] - end_ns_[forward] + length_ns_[forward];
  }
}

void OrderTimes::GiveFusedTheirs(const TaskOrder& order,
                                 std::vector<int64_t>& starts) const {
  for (int p = 0; p < graph_.pairs; ++p) {
    if (IsFused(order, p)) {
      starts[3 * p + kWeightTask] = starts[3 * p + kGradientTask];
    }
  }
}

void OrderTimes::Arrive(Task task) {
  const int r = RankOf(task);
  Rank& rank = ranks_[r];
  const int64_t at_ns = may_run_ns_[task];
  if (at_ns <= rank.free_ns) {
    rank.ready.Insert(place_[task]);
    next_start_ns_[r] = rank.free_ns;
    return;
  }
  rank.waiting.push_back({at_ns, task});
  std::push_heap(rank.waiting.begin(), rank.waiting.end(), Later());
  next_start_ns_[r] = std::min(next_start_ns_[r], at_ns);
}

// What was held is ready again, as far as there is room for its activations.
void OrderTimes::Admit(int r, const TaskOrder& order) {
  Rank& rank = ranks_[r];
  int64_t live_bytes = rank.live_bytes;
  while (!rank.held.empty()) {
    live_bytes += BytesOf(order, rank.tasks[rank.held.Last()]);
    if (live_bytes > graph_.limit_bytes[r]) return;
    rank.ready.Insert(rank.held.TakeLast());
  }
}

// When rank `r` can go on in reversed time; never when all that is left there
// is held.
void OrderTimes::UpdateNextStart(int r) {
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
Task OrderTimes::TakeReady(int r, const TaskOrder& order, int64_t at_ns) {
  Rank& rank = ranks_[r];
  std::vector<Arrival>& waiting = rank.waiting;
  while (!waiting.empty() && waiting[0].at_ns <= at_ns) {
    rank.ready.Insert(place_[waiting[0].task]);
    std::pop_heap(waiting.begin(), waiting.end(), Later());
    waiting.pop_back();
  }
  const int place = rank.ready.TakeLast();
  const Task task = rank.tasks[place];
  if (TaskKind(task) != kGradientTask ||
      rank.live_bytes + BytesOf(order, task) <= graph_.limit_bytes[r]) {
    return task;
  }
  rank.held.Insert(place);
  return -1;
}

void OrderTimes::Latest(const TaskOrder& order, std::vector<int64_t>& starts) {
  TimeOrder(order);
  may_run_ns_.assign(end_ns_.size(), 0);
  waits_ = first_waits_;
  for (int p = 0; p < graph_.pairs; ++p) {
    if (IsFused(order, p)) --waits_[3 * p + kGradientTask];
  }
  for (Rank& rank : ranks_) {
    rank.free_ns = rank.live_bytes = 0;
    rank.ready.Reset(static_cast<int>(rank.tasks.size()));
    rank.held.Reset(static_cast<int>(rank.tasks.size()));
  }
  next_start_ns_.assign(graph_.ranks, kNever);
  for (const Task task : order.tasks) {
    if (waits_[task] == 0) Arrive(task);
  }
  // At first, how long before the end of all a task starts.
  starts.assign(end_ns_.size(), 0);
  int64_t whole_ns = 0;
  for (size_t left = order.tasks.size(); left > 0;) {
    const auto first =
        std::min_element(next_start_ns_.begin(), next_start_ns_.end());
    Task task = -1;
    if (*first == kNever) {
      task = TakeHeld();
    } else {
      const int r = static_cast<int>(first - next_start_ns_.begin());
      task = TakeReady(r, order, *first);
      if (task < 0) {
        UpdateNextStart(r);
        continue;
      }
    }
    const int r = RankOf(task);
    Rank& rank = ranks_[r];
    rank.free_ns = std::max(rank.free_ns, may_run_ns_[task]) + length_ns_[task];
    starts[task] = rank.free_ns;
    whole_ns = std::max(whole_ns, rank.free_ns);
    if (TaskKind(task) == kGradientTask) {
      rank.live_bytes += BytesOf(order, task);
    } else if (TaskKind(task) == kForwardTask &&
               graph_.has_backward(TaskPair(task))) {
      rank.live_bytes -= BytesOf(order, task);
      Admit(r, order);
    }
    ForEachBefore(task, [&](Task before, int64_t delay_ns) {
      may_run_ns_[before] =
          std::max(may_run_ns_[before], starts[task] + delay_ns);
      if (--waits_[before] == 0) Arrive(before);
    });
    UpdateNextStart(r);
    --left;
  }
  for (const Task task : order.tasks) starts[task] = whole_ns - starts[task];
  GiveFusedTheirs(order, starts);
}

}  // namespace pipeweaver::search
