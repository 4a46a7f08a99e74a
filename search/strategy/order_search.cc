// Local search on an order; see order_search.h.

#include "search/strategy/order_search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/task_edges.h"
#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

constexpr int kProposalsPerStopCheck = 16;
constexpr int kFarthestShift = 12;
constexpr int kCriticalTries = 40;
constexpr int kBits = 64;  // of a word of dirty_

}  // namespace

OrderSearch::OrderSearch(const ProblemGraph& graph)
    : graph_(graph), edges_(graph) {
  for (int p = 0; p < graph.pairs; ++p) {
    can_choose_ = can_choose_ || graph.choices_of(p).size() > 1;
    if (graph.mode[p] != PairMode::kSplit) continue;
    for (const GraphChoice& choice : graph.choices_of(p)) {
      can_fuse_ = can_fuse_ || choice.has_backward();
    }
  }
  marked_.assign(3 * static_cast<size_t>(graph.pairs), 0);
}

int64_t OrderSearch::LengthOf(Task task) const {
  return TaskLength(graph_, ways_, task);
}

inline OrderSearch::Bytes OrderSearch::BytesOf(Task task) const {
  const int pair = TaskPair(task);
  const GraphChoice& choice = graph_.choices_of(pair)[ways_.choice[pair]];
  const bool splits =
      graph_.mode[pair] == PairMode::kSplit && ways_.fused[pair] == 0;
  switch (TaskKind(task)) {
    case kForwardTask:
      return {choice.activation_bytes,
              graph_.has_backward(pair) ? choice.activation_bytes : 0};
    case kGradientTask:
      return {
          BackwardStepBytes(choice, graph_.mode[pair], !splits) -
              choice.activation_bytes,
          (splits ? choice.weight_grad_bytes : 0) - choice.activation_bytes};
    default:
      return {0, -choice.weight_grad_bytes};
  }
}

void OrderSearch::Load(const TaskOrder& order) {
  const int tasks = 3 * graph_.pairs;
  ways_ = order.ways;
  sequence_.clear();
  exists_.assign(tasks, 0);
  for (const Task task : order.tasks) {
    sequence_.push_back(task);
    exists_[task] = 1;
    // A W that is fused away keeps a place, so that it can come back.
    const int pair = TaskPair(task);
    if (TaskKind(task) == kGradientTask &&
        graph_.mode[pair] == PairMode::kSplit && ways_.fused[pair] != 0) {
      sequence_.push_back(3 * pair + kWeightTask);
    }
  }
  position_.assign(tasks, -1);
  rank_prev_.assign(tasks, -1);
  rank_next_.assign(tasks, -1);
  rank_last_.assign(graph_.ranks, -1);
  length_ns_.assign(tasks, 0);
  end_ns_.assign(tasks, 0);
  left_ns_.assign(tasks, 0);
  live_before_.assign(tasks, 0);
  dirty_.assign(sequence_.size() / kBits + 1, 0);
  changed_.clear();
  const auto link = [&] {
    std::fill(rank_last_.begin(), rank_last_.end(), -1);
    std::vector<int64_t> live(graph_.ranks, 0);
    for (size_t i = 0; i < sequence_.size(); ++i) {
      const Task task = sequence_[i];
      const int r = graph_.pair_rank[TaskPair(task)];
      position_[task] = static_cast<int32_t>(i);
      if (!Exists(task)) continue;
      rank_prev_[task] = rank_last_[r];
      rank_next_[task] = -1;
      if (rank_last_[r] >= 0) rank_next_[rank_last_[r]] = task;
      rank_last_[r] = task;
      length_ns_[task] = LengthOf(task);
      live_before_[task] = live[r];
      live[r] += BytesOf(task).after;
    }
  };
  link();
  for (const Task task : sequence_) {
    if (Exists(task)) end_ns_[task] = EndOf(task);
  }
  // In order of start times, what a move must reorder stands close together.
  std::vector<std::pair<int64_t, Task>> starts;
  starts.reserve(sequence_.size());
  for (const Task task : sequence_) {
    starts.emplace_back(Exists(task)
                            ? StartOf(task)
                            : end_ns_[3 * TaskPair(task) + kGradientTask],
                        task);
  }
  std::stable_sort(
      starts.begin(), starts.end(),
      [](const auto& a, const auto& b) { return a.first < b.first; });
  for (size_t i = 0; i < starts.size(); ++i) sequence_[i] = starts[i].second;
  link();
  RefreshAll();
}

inline void OrderSearch::MarkDirty(Task task) {
  const int at = position_[task];
  dirty_[at / kBits] |= uint64_t{1} << (at % kBits);
}

// Recomputes end times of what is dirty, in the order of the sequence, and
// behind it wherever changes reach.
void OrderSearch::ForwardPass(size_t first_word) {
  for (size_t word = first_word; word < dirty_.size(); ++word) {
    while (dirty_[word] != 0) {
      const int bit = std::countr_zero(dirty_[word]);
      dirty_[word] &= dirty_[word] - 1;
      const Task task = sequence_[static_cast<int>(word) * kBits + bit];
      const int64_t old_ns = end_ns_[task], new_ns = EndOf(task);
      if (new_ns == old_ns) continue;
      end_ns_[task] = new_ns;
      replaced_.push_back({task, old_ns});
      // Those that start later now, or that waited for just this.
      const Task next = rank_next_[task];
      if (next >= 0 && (new_ns > StartOf(next) || old_ns == StartOf(next))) {
        MarkDirty(next);
      }
      for (const TaskEdge& edge : edges_.after(task)) {
        const int64_t start_ns = StartOf(edge.task);
        if (Exists(edge.task) && (new_ns + edge.delay_ns > start_ns ||
                                  old_ns + edge.delay_ns == start_ns)) {
          MarkDirty(edge.task);
        }
      }
    }
  }
}

inline int64_t OrderSearch::EndOf(Task task) const {
  const Task prev = rank_prev_[task];
  int64_t start = prev >= 0 ? end_ns_[prev] : 0;
  for (const TaskEdge& edge : edges_.before(task)) {
    start = std::max(start, end_ns_[edge.task] + edge.delay_ns);
  }
  return start + length_ns_[task];
}

// As ForwardPass, for the time left from a task's start, the other way.
void OrderSearch::BackwardPass(size_t last_word) {
  for (size_t word = last_word + 1; word-- > 0;) {
    while (dirty_[word] != 0) {
      const int bit = kBits - 1 - std::countl_zero(dirty_[word]);
      dirty_[word] &= ~(uint64_t{1} << bit);
      const Task task = sequence_[static_cast<int>(word) * kBits + bit];
      const int64_t old_ns = left_ns_[task], new_ns = LeftOf(task);
      if (new_ns == old_ns) continue;
      left_ns_[task] = new_ns;
      // Those that have more left now, or whose rest waited for just this.
      const Task prev = rank_prev_[task];
      if (prev >= 0 && (new_ns > TailOf(prev) || old_ns == TailOf(prev))) {
        MarkDirty(prev);
      }
      for (const TaskEdge& edge : edges_.before(task)) {
        const int64_t tail_ns = TailOf(edge.task);
        if (new_ns + edge.delay_ns > tail_ns ||
            old_ns + edge.delay_ns == tail_ns) {
          MarkDirty(edge.task);
        }
      }
    }
  }
}

inline int64_t OrderSearch::LeftOf(Task task) const {
  const Task next = rank_next_[task];
  int64_t left = next >= 0 ? left_ns_[next] : 0;
  for (const TaskEdge& edge : edges_.after(task)) {
    // A W that is fused away has nothing left.
    left = std::max(left, left_ns_[edge.task] + edge.delay_ns);
  }
  return left + length_ns_[task];
}

// Marks what changed as dirty; returns the first and the last word marked.
std::pair<size_t, size_t> OrderSearch::MarkChanged() {
  size_t first_word = dirty_.size(), last_word = 0;
  for (const Task task : changed_) {
    if (task < 0 || !Exists(task)) continue;
    MarkDirty(task);
    const size_t word = position_[task] / kBits;
    first_word = std::min(first_word, word);
    last_word = std::max(last_word, word);
  }
  return {first_word, last_word};
}

// Brings times up to date after tasks changed their lengths or their neighbours
// on the rank.
void OrderSearch::Refresh() {
  RefreshEnds();
  RefreshLefts();
}

void OrderSearch::RefreshEnds() {
  replaced_.clear();
  ForwardPass(MarkChanged().first);
  FindMakespan();
}

void OrderSearch::RefreshLefts() {
  BackwardPass(MarkChanged().second);
  changed_.clear();
}

// As Refresh where the makespan then is accepted; else all times stay as they
// were, and the caller takes back the change and clears changed_.
bool OrderSearch::RefreshIfAccepted(double temperature) {
  const int64_t old_ns = makespan_ns_;
  RefreshEnds();
  const int64_t new_ns = makespan_ns_;
  makespan_ns_ = old_ns;
  if (Accept(new_ns, temperature)) {
    makespan_ns_ = new_ns;
    RefreshLefts();
    return true;
  }
  for (const End& end : replaced_) end_ns_[end.task] = end.ns;
  return false;
}

void OrderSearch::RefreshAll() {
  for (const Task task : sequence_) {
    if (Exists(task)) end_ns_[task] = EndOf(task);
  }
  for (size_t i = sequence_.size(); i-- > 0;) {
    if (Exists(sequence_[i])) left_ns_[sequence_[i]] = LeftOf(sequence_[i]);
  }
  changed_.clear();
  FindMakespan();
}

void OrderSearch::FindMakespan() {
  makespan_ns_ = 0;
  for (int r = 0; r < graph_.ranks; ++r) {
    if (rank_last_[r] >= 0) {
      makespan_ns_ = std::max(makespan_ns_, end_ns_[rank_last_[r]]);
    }
  }
  critical_.clear();
}

// A task on a longest path: tried at random first, which costs less than to
// follow one.
Task OrderSearch::PickCritical() {
  const auto tasks = static_cast<uint32_t>(sequence_.size());
  for (int i = 0; i < kCriticalTries; ++i) {
    const Task task = sequence_[RandomBelow(tasks)];
    if (StartOf(task) + left_ns_[task] == makespan_ns_) return task;
  }
  if (critical_.empty()) TraceCriticalPath();
  return critical_[RandomBelow(critical_.size())];
}

void OrderSearch::TraceCriticalPath() {
  critical_.clear();
  Task task = -1;
  for (int r = 0; r < graph_.ranks; ++r) {
    if (rank_last_[r] >= 0 && end_ns_[rank_last_[r]] == makespan_ns_) {
      task = rank_last_[r];
      break;
    }
  }
  while (task >= 0) {
    critical_.push_back(task);
    const int64_t start = StartOf(task);
    Task from = -1;
    // Dependencies first: where they bind, the rank's order is not to blame.
    for (const TaskEdge& edge : edges_.before(task)) {
      if (end_ns_[edge.task] + edge.delay_ns == start) {
        from = edge.task;
        break;
      }
    }
    const Task prev = rank_prev_[task];
    if (prev >= 0 && end_ns_[prev] == start &&
        (from < 0 || (Random() & 1) != 0)) {
      from = prev;
    }
    task = from;
  }
}

bool OrderSearch::MemoryAllowsSwap(Task first, Task second) const {
  const int64_t limit = graph_.limit_bytes[graph_.pair_rank[TaskPair(first)]];
  const Bytes one = BytesOf(first), two = BytesOf(second);
  const int64_t live = live_before_[first];
  return live + two.peak <= limit && live + two.after <= limit &&
         live + two.after + one.peak <= limit;
}

// The longest path through `first` and its rank's next task `second` if they
// change places.
int64_t OrderSearch::EstimateSwap(Task first, Task second) const {
  const Task prev = rank_prev_[first];
  int64_t start_two = prev >= 0 ? end_ns_[prev] : 0;
  for (const TaskEdge& edge : edges_.before(second)) {
    start_two = std::max(start_two, end_ns_[edge.task] + edge.delay_ns);
  }
  int64_t start_one = start_two + length_ns_[second];
  for (const TaskEdge& edge : edges_.before(first)) {
    start_one = std::max(start_one, end_ns_[edge.task] + edge.delay_ns);
  }
  const Task next = rank_next_[second];
  int64_t left_one = next >= 0 ? left_ns_[next] : 0;
  for (const TaskEdge& edge : edges_.after(first)) {
    left_one = std::max(left_one, left_ns_[edge.task] + edge.delay_ns);
  }
  left_one += length_ns_[first];
  int64_t left_two = left_one;
  for (const TaskEdge& edge : edges_.after(second)) {
    left_two = std::max(left_two, left_ns_[edge.task] + edge.delay_ns);
  }
  left_two += length_ns_[second];
  return std::max(start_two + left_two, start_one + left_one);
}

bool OrderSearch::DependsOnMarked(Task task) const {
  for (const TaskEdge& edge : edges_.before(task)) {
    if (marked_[edge.task] != 0) return true;
  }
  return false;
}

// Makes the rank's neighbours `first`, `second` change places: in the sequence,
// what depends on `first` moves behind both, the rest before them. False and no
// change when `second` depends on `first`.
bool OrderSearch::Swap(Task first, Task second) {
  const int from = position_[first], to = position_[second];
  depending_.clear();
  rest_.clear();
  marked_[first] = 1;
  for (int i = from + 1; i < to; ++i) {
    const Task task = sequence_[i];
    const Task prev = rank_prev_[task];
    if ((prev >= 0 && marked_[prev] != 0) || DependsOnMarked(task)) {
      marked_[task] = 1;
      depending_.push_back(task);
    } else {
      rest_.push_back(task);
    }
  }
  const bool stuck = DependsOnMarked(second);
  marked_[first] = 0;
  for (const Task task : depending_) marked_[task] = 0;
  if (stuck) return false;
  int at = from;
  const auto put = [&](Task task) {
    sequence_[at] = task;
    position_[task] = at++;
  };
  for (const Task task : rest_) put(task);
  put(second);
  put(first);
  for (const Task task : depending_) put(task);
  const Task prev = rank_prev_[first], next = rank_next_[second];
  rank_prev_[second] = prev;
  rank_next_[second] = first;
  rank_prev_[first] = second;
  rank_next_[first] = next;
  if (prev >= 0) rank_next_[prev] = second;
  if (next >= 0) {
    rank_prev_[next] = first;
  } else {
    rank_last_[graph_.pair_rank[TaskPair(first)]] = first;
  }
  live_before_[second] = live_before_[first];
  live_before_[first] = live_before_[second] + BytesOf(second).after;
  changed_.insert(changed_.end(), {prev, second, first, next});
  return true;
}

bool OrderSearch::Accept(int64_t estimate_ns, double temperature) {
  if (estimate_ns <= makespan_ns_) return true;
  if (temperature <= 0) return false;
  const double over = static_cast<double>(estimate_ns - makespan_ns_);
  const double chance = std::exp(-over / temperature);
  return static_cast<double>(Random() >> 11) * 0x1p-53 < chance;
}

// Two neighbours on a rank, one of them critical, change places.
bool OrderSearch::ProposeSwap(double temperature) {
  const Task task = PickCritical();
  Task first = rank_prev_[task], second = task;
  if (first < 0 || (Random() & 1) != 0) {
    first = task;
    second = rank_next_[task];
    if (second < 0) return false;
  }
  if (TaskPair(first) == TaskPair(second)) return false;
  const int64_t estimate_ns = EstimateSwap(first, second);
  if (!Accept(estimate_ns, temperature)) return false;
  if (!MemoryAllowsSwap(first, second)) return false;
  if (estimate_ns > makespan_ns_) SaveBest();
  if (!Swap(first, second)) return false;
  Refresh();
  return true;
}

// A critical task moves several places along its rank.
bool OrderSearch::ProposeShift(double temperature) {
  const Task task = PickCritical();
  const bool earlier = (Random() & 1) != 0;
  const int places = 2 + static_cast<int>(RandomBelow(kFarthestShift - 1));
  const int64_t limit = graph_.limit_bytes[graph_.pair_rank[TaskPair(task)]];
  // The tasks it passes, in the rank's order.
  window_.clear();
  for (Task at = earlier ? rank_prev_[task] : rank_next_[task];
       at >= 0 && static_cast<int>(window_.size()) < places;
       at = earlier ? rank_prev_[at] : rank_next_[at]) {
    if (TaskPair(at) == TaskPair(task)) break;
    window_.push_back(at);
  }
  if (window_.size() < 2) return false;
  if (earlier) std::reverse(window_.begin(), window_.end());
  const Task first = earlier ? window_.front() : task;
  const Task last = earlier ? task : window_.back();
  const Task outer_prev = rank_prev_[first], outer_next = rank_next_[last];
  if (earlier) {
    window_.insert(window_.begin(), task);
  } else {
    window_.push_back(task);
  }
  // Memory along the new order.
  int64_t live = live_before_[first];
  for (const Task at : window_) {
    const Bytes bytes = BytesOf(at);
    if (live + bytes.peak > limit || live + bytes.after > limit) return false;
    live += bytes.after;
  }
  // The longest path through the tasks of the window in their new order.
  int64_t free = outer_prev >= 0 ? end_ns_[outer_prev] : 0;
  int64_t latest = 0;
  static thread_local std::vector<int64_t> starts;
  starts.clear();
  for (const Task at : window_) {
    for (const TaskEdge& edge : edges_.before(at)) {
      free = std::max(free, end_ns_[edge.task] + edge.delay_ns);
    }
    starts.push_back(free);
    free += length_ns_[at];
  }
  int64_t left = outer_next >= 0 ? left_ns_[outer_next] : 0;
  for (size_t i = window_.size(); i-- > 0;) {
    const Task at = window_[i];
    for (const TaskEdge& edge : edges_.after(at)) {
      left = std::max(left, left_ns_[edge.task] + edge.delay_ns);
    }
    left += length_ns_[at];
    latest = std::max(latest, starts[i] + left);
  }
  if (!Accept(latest, temperature)) return false;
  SaveBest();
  const size_t passes = window_.size() - 1;
  size_t done = 0;
  while (done < passes) {
    const bool moved =
        earlier ? Swap(rank_prev_[task], task) : Swap(task, rank_next_[task]);
    if (!moved) break;
    ++done;
  }
  if (done == 0) return false;
  if (done < passes) {
    // A path of other ranks forbids the rest, and memory was checked only for
    // the whole way: go back.
    for (; done > 0; --done) {
      const bool back =
          earlier ? Swap(task, rank_next_[task]) : Swap(rank_prev_[task], task);
      PW_CHECK(back);
    }
  }
  Refresh();
  return true;
}

void OrderSearch::SetPair(int pair) {
  for (int kind = 0; kind < 3; ++kind) {
    const Task task = 3 * pair + kind;
    if (!Exists(task)) continue;
    length_ns_[task] = LengthOf(task);
    changed_.push_back(task);
  }
}

Task OrderSearch::LastOf(int pair) const {
  for (const int kind : {kWeightTask, kGradientTask}) {
    if (Exists(3 * pair + kind)) return 3 * pair + kind;
  }
  return 3 * pair + kForwardTask;
}

// Whether the pair's rank stays within memory from its F to its last task.
bool OrderSearch::MemoryAllowsPair(int pair) const {
  const int64_t limit = graph_.limit_bytes[graph_.pair_rank[pair]];
  const Task first = 3 * pair + kForwardTask, last = LastOf(pair);
  int64_t live = live_before_[first];
  for (Task task = first;; task = rank_next_[task]) {
    const Bytes bytes = BytesOf(task);
    if (live + bytes.peak > limit || live + bytes.after > limit) return false;
    live += bytes.after;
    if (task == last) return true;
  }
}

void OrderSearch::RecountPair(int pair) {
  const Task first = 3 * pair + kForwardTask, last = LastOf(pair);
  int64_t live = live_before_[first];
  for (Task task = first;; task = rank_next_[task]) {
    live_before_[task] = live;
    live += BytesOf(task).after;
    if (task == last) return;
  }
}

void OrderSearch::Unlink(Task task) {
  const Task prev = rank_prev_[task], next = rank_next_[task];
  if (prev >= 0) rank_next_[prev] = next;
  if (next >= 0) {
    rank_prev_[next] = prev;
  } else {
    rank_last_[graph_.pair_rank[TaskPair(task)]] = prev;
  }
  exists_[task] = 0;
  rank_prev_[task] = rank_next_[task] = -1;
  length_ns_[task] = left_ns_[task] = end_ns_[task] = 0;
  changed_.insert(changed_.end(), {prev, next});
}

void OrderSearch::LinkAfter(Task task, Task before) {
  const Task next = rank_next_[before];
  exists_[task] = 1;
  rank_prev_[task] = before;
  rank_next_[task] = next;
  rank_next_[before] = task;
  if (next >= 0) {
    rank_prev_[next] = task;
  } else {
    rank_last_[graph_.pair_rank[TaskPair(task)]] = task;
  }
  changed_.insert(changed_.end(), {before, task, next});
  const auto put = [this](Task at, int place) {
    sequence_[place] = at;
    position_[at] = place;
  };
  const int at = position_[task];
  if (at <= position_[before]) {
    const int place = position_[before];
    for (int i = at; i < place; ++i) put(sequence_[i + 1], i);
    put(task, place);
  } else if (next >= 0 && at > position_[next]) {
    const int place = position_[before] + 1;
    for (int i = at; i > place; --i) put(sequence_[i - 1], i);
    put(task, place);
  }
}

// A backward in two pieces becomes one where its slack allows, or a critical
// one in one piece becomes two, its W behind, where the rank waits next.
bool OrderSearch::ProposeFuse(double temperature) {
  const bool split = (Random() & 1) != 0;
  int pair = static_cast<int>(RandomBelow(graph_.pairs));
  if (split) {
    const Task task = PickCritical();
    if (TaskKind(task) != kGradientTask) return false;
    pair = TaskPair(task);
  }
  if (graph_.mode[pair] != PairMode::kSplit) return false;
  const GraphChoice& choice = graph_.choices_of(pair)[ways_.choice[pair]];
  if (!choice.has_backward() || (ways_.fused[pair] != 0) != split) return false;
  const Task gradient = 3 * pair + kGradientTask;
  const Task weight = 3 * pair + kWeightTask;
  if (!split) {
    Task behind = rank_next_[gradient];
    if (behind == weight) behind = rank_next_[weight];
    int64_t tail = behind >= 0 ? left_ns_[behind] : 0;
    for (const TaskEdge& edge : edges_.after(gradient)) {
      if (edge.task == weight) continue;
      tail = std::max(tail, left_ns_[edge.task] + edge.delay_ns);
    }
    if (!Accept(StartOf(gradient) + choice.backward_ns + tail, temperature)) {
      return false;
    }
    SaveBest();
    // The fused backward's own bytes; the rest of the rank only gains.
    ways_.fused[pair] = 1;
    if (live_before_[gradient] + BytesOf(gradient).peak >
        graph_.limit_bytes[graph_.pair_rank[pair]]) {
      ways_.fused[pair] = 0;
      return false;
    }
    for (Task at = rank_next_[gradient]; at != weight; at = rank_next_[at]) {
      live_before_[at] -= choice.weight_grad_bytes;
    }
    Unlink(weight);
    SetPair(pair);
    Refresh();
    return true;
  }
  // The place for W: before the first idle time of the rank behind I.
  Task before = gradient;
  const int64_t limit = graph_.limit_bytes[graph_.pair_rank[pair]];
  SaveBest();
  ways_.fused[pair] = 0;
  const Bytes bytes = BytesOf(gradient);
  const int64_t live = live_before_[gradient];
  if (live + bytes.peak > limit || live + bytes.after > limit) {
    ways_.fused[pair] = 1;
    return false;
  }
  while (true) {
    const Task next = rank_next_[before];
    if (next < 0 || StartOf(next) > end_ns_[before]) break;
    const Bytes next_bytes = BytesOf(next);
    const int64_t next_live = live_before_[next] + choice.weight_grad_bytes;
    if (next_live + next_bytes.peak > limit ||
        next_live + next_bytes.after > limit) {
      break;
    }
    before = next;
  }
  for (Task at = gradient; at != before;) {
    at = rank_next_[at];
    live_before_[at] += choice.weight_grad_bytes;
  }
  LinkAfter(weight, before);
  live_before_[weight] = live_before_[before] + BytesOf(before).after;
  SetPair(pair);
  if (RefreshIfAccepted(temperature)) return true;
  for (Task at = rank_next_[gradient]; at != weight; at = rank_next_[at]) {
    live_before_[at] -= choice.weight_grad_bytes;
  }
  Unlink(weight);
  ways_.fused[pair] = 1;
  SetPair(pair);
  changed_.clear();
  return false;
}

// Runs a pair of kSplit another way, fused or not; its W, if it comes back,
// behind `weight_after`. Memory is counted, not checked.
void OrderSearch::ChangeWay(int pair, int choice, bool fused,
                            Task weight_after) {
  const Task weight = 3 * pair + kWeightTask;
  const bool had_weight = Exists(weight);
  // With the old bytes, take the pair out of what lies behind it.
  const Task first = 3 * pair + kForwardTask;
  Task behind = rank_next_[had_weight ? weight : 3 * pair + kGradientTask];
  if (had_weight && fused) Unlink(weight);
  ways_.choice[pair] = choice;
  ways_.fused[pair] = fused ? Ways::kFused : Ways::kApart;
  if (!had_weight && !fused) {
    LinkAfter(weight, weight_after);
    // What stands between I and W is behind the pair no longer.
    if (behind >= 0 && position_[behind] < position_[weight]) {
      behind = rank_next_[weight];
    }
  }
  int64_t live = live_before_[first];
  for (Task task = first; task != behind; task = rank_next_[task]) {
    live_before_[task] = live;
    live += BytesOf(task).after;
  }
  SetPair(pair);
}

// A pair changes choice and fusing together.
bool OrderSearch::ProposeWay(double temperature) {
  int pair = TaskPair(PickCritical());
  if ((Random() & 1) == 0) pair = static_cast<int>(RandomBelow(graph_.pairs));
  if (graph_.mode[pair] != PairMode::kSplit) return false;
  const auto choices = graph_.choices_of(pair);
  const int choice = static_cast<int>(RandomBelow(choices.size()));
  const bool was_fused = ways_.fused[pair] == Ways::kFused;
  const int old_choice = ways_.choice[pair];
  if (!was_fused && !choices[choice].has_backward()) return false;
  const Task gradient = 3 * pair + kGradientTask;
  const Task weight = 3 * pair + kWeightTask;
  const Task weight_prev = was_fused ? gradient : rank_prev_[weight];
  const int64_t weight_end_ns = end_ns_[weight];
  const int64_t weight_left_ns = left_ns_[weight];
  SaveBest();
  ChangeWay(pair, choice, !was_fused, gradient);
  if (MemoryAllowsPair(pair) && RefreshIfAccepted(temperature)) return true;
  ChangeWay(pair, old_choice, was_fused, weight_prev);
  end_ns_[weight] = weight_end_ns;
  left_ns_[weight] = weight_left_ns;
  changed_.clear();
  critical_.clear();
  return false;
}

// A pair, mostly a critical one, changes its choice.
bool OrderSearch::ProposeChoice(double temperature) {
  int pair = TaskPair(PickCritical());
  if ((Random() & 3) == 0) pair = static_cast<int>(RandomBelow(graph_.pairs));
  const auto choices = graph_.choices_of(pair);
  if (choices.size() < 2) return false;
  const int old_choice = ways_.choice[pair];
  const int new_choice = static_cast<int>(RandomBelow(choices.size()));
  if (new_choice == old_choice ||
      (ways_.fused[pair] != 0 && !choices[new_choice].has_backward())) {
    return false;
  }
  SaveBest();
  ways_.choice[pair] = new_choice;
  const Task forward = 3 * pair + kForwardTask;
  const Task gradient = 3 * pair + kGradientTask;
  const Task weight = 3 * pair + kWeightTask;
  int64_t estimate = 0;
  for (const Task task : {forward, gradient, weight}) {
    if (!Exists(task)) continue;
    estimate =
        std::max(estimate, StartOf(task) + LengthOf(task) + TailOf(task));
  }
  if (!Accept(estimate, temperature) || !MemoryAllowsPair(pair)) {
    ways_.choice[pair] = old_choice;
    return false;
  }
  RecountPair(pair);
  SetPair(pair);
  Refresh();
  return true;
}

void OrderSearch::RecountMemory() {
  std::vector<int64_t> live(graph_.ranks, 0);
  for (const Task task : sequence_) {
    if (!Exists(task)) continue;
    const int r = graph_.pair_rank[TaskPair(task)];
    live_before_[task] = live[r];
    live[r] += BytesOf(task).after;
  }
}

// End times are exact up to the task at hand; left_ns_ is that of the order
// before the pass. Every path through the tasks behind keeps
// end + left <= makespan: a fused backward is taken only where that holds for
// what follows it, and what is fused later only removes work from those paths
// or is held to the same test.
int OrderSearch::FuseWhereSlack() {
  int fused = 0;
  for (const Task task : sequence_) {
    if (!Exists(task)) continue;  // a W fused away
    const Task prev = rank_prev_[task];
    int64_t start = prev >= 0 ? end_ns_[prev] : 0;
    for (const TaskEdge& edge : edges_.before(task)) {
      start = std::max(start, end_ns_[edge.task] + edge.delay_ns);
    }
    end_ns_[task] = start + length_ns_[task];
    const int pair = TaskPair(task);
    if (TaskKind(task) != kGradientTask ||
        graph_.mode[pair] != PairMode::kSplit || ways_.fused[pair] != 0) {
      continue;
    }
    const GraphChoice& choice = graph_.choices_of(pair)[ways_.choice[pair]];
    if (!choice.has_backward()) continue;
    const Task weight = 3 * pair + kWeightTask;
    Task next = rank_next_[task];
    if (next == weight) next = rank_next_[weight];
    int64_t left = next >= 0 ? left_ns_[next] : 0;
    for (const TaskEdge& edge : edges_.after(task)) {
      if (edge.task == weight) continue;
      left = std::max(left, left_ns_[edge.task] + edge.delay_ns);
    }
    if (start + choice.backward_ns + left > makespan_ns_) continue;
    ways_.fused[pair] = 1;
    if (live_before_[task] + BytesOf(task).peak >
        graph_.limit_bytes[graph_.pair_rank[pair]]) {
      ways_.fused[pair] = 0;
      continue;
    }
    ++fused;
    length_ns_[task] = choice.backward_ns;
    end_ns_[task] = start + choice.backward_ns;
    Unlink(weight);
  }
  if (fused > 0) RecountMemory();
  RefreshAll();
  return fused;
}

int OrderSearch::SpeedUpWhereMemoryAllows(const std::function<bool()>* stop) {
  struct Step {
    double gain;  // ns per byte
    int32_t pair, choice;
  };
  const auto length = [this](int pair, const GraphChoice& choice) {
    if (!graph_.has_backward(pair)) return choice.forward_ns;
    return choice.forward_ns +
           (graph_.mode[pair] == PairMode::kSplit && ways_.fused[pair] == 0
                ? choice.input_grad_ns + choice.weight_grad_ns
                : choice.backward_ns);
  };
  std::vector<Step> steps;
  for (int p = 0; p < graph_.pairs; ++p) {
    const auto choices = graph_.choices_of(p);
    const GraphChoice& now = choices[ways_.choice[p]];
    for (int c = 0; c < choices.size(); ++c) {
      if (ways_.fused[p] != 0 && !choices[c].has_backward()) continue;
      const int64_t gain = length(p, now) - length(p, choices[c]);
      if (gain <= 0) continue;
      const int64_t bytes = std::max<int64_t>(
          1, choices[c].activation_bytes - now.activation_bytes);
      steps.push_back(
          {static_cast<double>(gain) / static_cast<double>(bytes), p, c});
    }
  }
  std::stable_sort(
      steps.begin(), steps.end(),
      [](const Step& a, const Step& b) { return a.gain > b.gain; });
  int changed = 0;
  for (const Step& step : steps) {
    if (stop != nullptr && (*stop)()) break;
    const auto choices = graph_.choices_of(step.pair);
    const int old_choice = ways_.choice[step.pair];
    if (length(step.pair, choices[step.choice]) >=
        length(step.pair, choices[old_choice])) {
      continue;
    }
    ways_.choice[step.pair] = step.choice;
    if (!MemoryAllowsPair(step.pair)) {
      ways_.choice[step.pair] = old_choice;
      continue;
    }
    RecountPair(step.pair);
    SetPair(step.pair);
    ++changed;
  }
  if (changed > 0) RefreshAll();
  return changed;
}

void OrderSearch::SaveBest() {
  if (!best_unsaved_) return;
  Save(*best_);
  best_unsaved_ = false;
}

void OrderSearch::Save(TaskOrder& to) const {
  to.tasks.clear();
  for (const Task task : sequence_) {
    if (Exists(task)) to.tasks.push_back(task);
  }
  to.ways = ways_;
  to.makespan_ns = makespan_ns_;
}

int64_t OrderSearch::Anneal(const WalkOptions& options, TaskOrder& best) {
  random_.seed(options.seed);
  if (best.tasks.empty() || makespan_ns_ < best.makespan_ns) Save(best);
  best_ = &best;
  const double temperature =
      options.temperature * static_cast<double>(best.makespan_ns);
  int64_t moves = 0;
  for (; moves < options.moves; ++moves) {
    if (moves % kProposalsPerStopCheck == 0) {
      if (best.makespan_ns <= options.stop_at_ns) break;
      if (options.stop != nullptr && (*options.stop)()) break;
    }
    const uint32_t pick = RandomBelow(16);
    bool moved = false;
    if (pick < 2 && can_fuse_) {
      moved = ProposeFuse(temperature);
    } else if (pick < 5 && can_choose_) {
      moved = can_fuse_ && pick == 2 && RandomBelow(8) == 0
                  ? ProposeWay(temperature)
                  : ProposeChoice(temperature);
    } else if (pick < 8) {
      moved = ProposeShift(temperature);
    } else {
      moved = ProposeSwap(temperature);
    }
    if (moved && makespan_ns_ < best.makespan_ns) {
      best.makespan_ns = makespan_ns_;
      best_unsaved_ = true;
    }
  }
  SaveBest();
  return moves;
}

}  // namespace pipeweaver::search
