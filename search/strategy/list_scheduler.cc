// The list scheduling engine; see list_scheduler.h.
//
// What runs for every stage is inline where that pays: functions of this size
// the compiler calls otherwise.

#include "search/strategy/list_scheduler.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/attributes.h"
#include "absl/status/statusor.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "search/problem/timing.h"
#include "search/strategy/first_of_least.h"
#include "search/strategy/safe_plan.h"
#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
// First stages that wait in a rank's queue at a time, besides those of
// components begun.
constexpr int kQueuedRoots = 4;
constexpr int kPatienceOne = 256;
// Stages that become ready together and are sorted into their queues together:
// one by one they would take quadratic time.
constexpr int kManyReady = 64;

void SortUnique(std::vector<int32_t>& numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
}

}  // namespace

ListModel::ListModel(const ProblemGraph& graph, const SafePlan& plan)
    : graph_(graph), plan_(plan) {
  const int components = static_cast<int>(plan.components.size());
  places_.resize(graph.pairs);
  rank_roots_.resize(graph.ranks);
  roots_.resize(components);
  frozen_for_.resize(graph.pairs);
  frozen_before_.resize(graph.pairs);
  component_work_ns_.assign(components, 0);
  for (int p = 0; p < graph.pairs; ++p) {
    Place& place = places_[p];
    place.rank = graph.pair_rank[p];
    place.component = plan.component_of_sweep[graph.pair_sweep[p]];
    place.mode = graph.mode[p];
    place.producers = graph.producers_of(p);
    place.consumers = graph.consumers_of(p);
    place.is_root = place.producers.size() == 0;
    if (place.is_root) rank_roots_[place.rank].push_back(p);
    all_backward_ = all_backward_ && place.has_backward();
    if (place.component < 0) continue;
    place.forwards_first = plan.components[place.component].forwards_first;
    all_forwards_first_ = all_forwards_first_ && place.forwards_first;
    component_work_ns_[place.component] += graph.choices_of(p)[0].forward_ns;
    if (place.is_root) roots_[place.component].push_back(p);
  }
  std::vector<std::vector<SafeStep>> by_rank(graph.ranks);
  std::vector<int32_t> cell_on(graph.ranks, -1);  // of the component at hand
  const std::vector<std::vector<int32_t>> last_frozen = FindLastFrozen();
  std::vector<int32_t> frozen, ranks;
  for (int c = 0; c < components; ++c) {
    const SafeComponent& component = plan.components[c];
    frozen.clear();
    for (const int sweep : component.sweeps) {
      AddFrozenProducers(last_frozen, sweep, frozen);
    }
    SortUnique(frozen);

    ranks.clear();
    const auto stands_on = [&](int pair) {
      int32_t& cell = cell_on[graph.pair_rank[pair]];
      if (cell >= 0) return;
      cell = 0;
      ranks.push_back(graph.pair_rank[pair]);
    };
    for (const SafeStep& step : component.steps) stands_on(step.pair);
    for (const int p : frozen) stands_on(p);
    std::sort(ranks.begin(), ranks.end());
    cell_begin_.push_back(static_cast<int32_t>(cells_.size()));
    for (const int r : ranks) {
      cell_on[r] = static_cast<int32_t>(cells_.size());
      cells_.push_back({.component = c, .rank = r});
    }
    backwards_.push_back(0);
    for (const SafeStep& step : component.steps) {
      const int r = graph.pair_rank[step.pair];
      if (!step.backward) {
        ++backwards_[c];
        ++cells_[cell_on[r]].forwards;
        places_[step.pair].cell = cell_on[r];
      }
      if (step.backward || !component.forwards_first) {
        by_rank[r].push_back(step);
      }
    }
    for (const int r : ranks) {
      Cell& cell = cells_[cell_on[r]];
      cell.steps_begin = static_cast<int32_t>(steps_.size());
      for (const SafeStep& step : by_rank[r]) {
        if (step.backward) {
          places_[step.pair].backward_step =
              static_cast<int32_t>(steps_.size());
        }
        steps_.push_back(step);
      }
      cell.steps_end = static_cast<int32_t>(steps_.size());
      by_rank[r].clear();
    }
    for (const int p : frozen) {
      const int cell = cell_on[graph.pair_rank[p]];
      frozen_for_[p].push_back(cell);
      ++cells_[cell].frozen;
    }
    for (const int r : ranks) cell_on[r] = -1;
  }
  cell_begin_.push_back(static_cast<int32_t>(cells_.size()));
}

void ListModel::AddFrozenProducers(
    const std::vector<std::vector<int32_t>>& last_frozen, int sweep,
    std::vector<int32_t>& pairs) const {
  for (const GraphEdge& edge :
       graph_.producers_of(graph_.sweep_first_pair[sweep])) {
    const std::vector<int32_t>& last =
        last_frozen[graph_.pair_sweep[edge.pair]];
    pairs.insert(pairs.end(), last.begin(), last.end());
  }
}

std::vector<std::vector<int32_t>> ListModel::FindLastFrozen() {
  std::vector<std::vector<int32_t>> last_frozen(graph_.sweeps);
  std::vector<int32_t> last_on(graph_.ranks, -1);  // of the sweep at hand
  std::vector<int32_t> before;
  for (const int first : graph_.topological) {
    const int sweep = graph_.pair_sweep[first];
    if (graph_.stage_index(first) > 0 || graph_.has_backward(first)) continue;
    before.clear();
    AddFrozenProducers(last_frozen, sweep, before);
    SortUnique(before);
    const int end = graph_.sweep_first_pair[sweep + 1];
    for (int p = end - 1; p >= first; --p) last_on[graph_.pair_rank[p]] = p;
    for (const int p : before) {
      const int own = last_on[graph_.pair_rank[p]];
      if (own >= 0) {
        frozen_before_[own].push_back(p);
      } else {
        last_frozen[sweep].push_back(p);
      }
    }
    for (int p = first; p < end; ++p) {
      int32_t& last = last_on[graph_.pair_rank[p]];
      if (last < p) frozen_before_[p].push_back(last);
      last = p;
    }
    for (int p = first; p < end; ++p) {
      int32_t& last = last_on[graph_.pair_rank[p]];
      if (last >= 0) last_frozen[sweep].push_back(last);
      last = -1;
    }
  }
  return last_frozen;
}

int64_t ListModel::NeedAlone(int cell_index, const Ways& ways) const {
  const Cell& cell = cells_[cell_index];
  const bool forwards_first = plan_.components[cell.component].forwards_first;
  int64_t need = 0, held = 0;  // from the last step back; nothing held after it
  for (int i = cell.steps_end - 1; i >= cell.steps_begin; --i) {
    const int p = steps_[i].pair;
    const GraphChoice& choice = graph_.choices_of(p)[ways.choice[p]];
    if (!steps_[i].backward) {
      need = std::max(need, held);
      held -= choice.activation_bytes;
      continue;
    }
    need =
        std::max(need, held + BackwardStepBytes(choice, graph_.mode[p],
                                                ways.fused[p] == Ways::kFused));
    held += choice.activation_bytes;
  }
  return forwards_first ? std::max(need, held) : need;
}

ListScheduler::ListScheduler(const ListModel& model)
    : model_(model), graph_(model.graph()) {
  const int components = static_cast<int>(model.plan().components.size());
  taken_.choice.assign(graph_.pairs, -1);
  taken_.fused.assign(graph_.pairs, Ways::kApart);
  runs_.resize(graph_.pairs);
  for (int p = 0; p < graph_.pairs; ++p) runs_[p].place = model.places_[p];
  waits_.resize(graph_.pairs);
  for (int p = 0; p < graph_.pairs; ++p) {
    first_waits_.push_back({0, 0, graph_.producers_of(p).size(),
                            1 + graph_.consumers_of(p).size()});
  }
  frozen_peak_.resize(graph_.pairs);
  frozen_fed_.resize(graph_.sweeps);
  suffix_need_.resize(model.steps_.size());
  step_done_.resize(model.steps_.size());
  first_cells_.resize(model.cells_.size());
  ranks_.resize(graph_.ranks);
  next_start_ns_.resize(graph_.ranks);
  std::vector<size_t> pairs_on(graph_.ranks, 0);
  for (const int rank : graph_.pair_rank) ++pairs_on[rank];
  for (int r = 0; r < graph_.ranks; ++r) {
    ranks_[r].limit_bytes = graph_.limit_bytes[r];
    ranks_[r].sorted_roots = model.rank_roots_[r];
    ranks_[r].queue.Reserve(2 * pairs_on[r]);
    ranks_[r].weights.Reserve(pairs_on[r]);
  }
  fed_.resize(graph_.pairs);
  is_begun_.resize(components);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void ListScheduler::Queue::Insert(
    const Entry& entry) {
  // Entries move towards the nearer end.
  if (begin_ > storage_.get() && entry < begin_[(end_ - begin_) / 2]) {
    Entry* at = --begin_;
    for (; at[1] < entry; ++at) at[0] = at[1];
    *at = entry;
    return;
  }
  Entry* at = end_++;
  for (; at > begin_ && entry < at[-1]; --at) at[0] = at[-1];
  *at = entry;
}

void ListScheduler::Queue::SortAppended() {
  if (appended_ == 0) return;
  Entry* const first = end_ - appended_;
  std::sort(first, end_);
  std::inplace_merge(begin_, first, end_);
  appended_ = 0;
}

inline ListScheduler::Entry ListScheduler::Queue::Take(Entry* taken) {
  // Those before it move up.
  Entry entry = *begin_;
  for (Entry* at = begin_; at < taken;) std::swap(entry, *++at);
  if (++begin_ == end_) Clear();
  return entry;
}

ListScheduler::Entry* ListScheduler::Queue::Find(Task task) const {
  Entry* at = begin_;
  while (at < end_ && at->task != task) ++at;
  return at;
}

void ListScheduler::SetPair(int pair, const Ways& ways) {
  const GraphChoice& choice = graph_.choices_of(pair)[ways.choice[pair]];
  PairRun& run = runs_[pair];
  const bool splits =
      graph_.mode[pair] == PairMode::kSplit && ways.fused[pair] != Ways::kFused;
  run.length_ns[kForwardTask] = choice.forward_ns;
  run.length_ns[kGradientTask] =
      splits ? choice.input_grad_ns : choice.backward_ns;
  run.length_ns[kWeightTask] = splits ? choice.weight_grad_ns : 0;
  run.least_backward_ns =
      run.length_ns[kGradientTask] + run.length_ns[kWeightTask];
  if (ways.fused[pair] == Ways::kEither && choice.has_backward()) {
    run.least_backward_ns = std::min(run.least_backward_ns, choice.backward_ns);
  }
  run.activation_bytes = choice.activation_bytes;
  run.gradient_bytes = BackwardStepBytes(choice, graph_.mode[pair],
                                         ways.fused[pair] == Ways::kFused);
  run.weight_bytes = splits ? choice.weight_grad_bytes : 0;
}

// The need of a cell by the steps of its safe plan; fills in suffix_need_.
int64_t ListScheduler::FindNeed(const ListModel::Cell& cell) {
  int64_t need = 0;
  if (model_.plan().components[cell.component].forwards_first) {
    // Backwards from the last on: held is what the later ones still hold.
    int64_t held = 0;
    for (int i = cell.steps_end - 1; i >= cell.steps_begin; --i) {
      const PairRun& run = runs_[model_.steps_[i].pair];
      need = std::max(need, held + run.gradient_bytes);
      suffix_need_[i] = need;
      held += run.activation_bytes;
    }
    need = std::max(need, held);
  } else {
    int64_t held = 0;  // before step i; nothing is held after the last one
    for (int i = cell.steps_end - 1; i >= cell.steps_begin; --i) {
      const PairRun& run = runs_[model_.steps_[i].pair];
      if (model_.steps_[i].backward) {
        need = std::max(need, held + run.gradient_bytes);
        held += run.activation_bytes;
      } else {
        need = std::max(need, held);
        held -= run.activation_bytes;
      }
      suffix_need_[i] = need;
    }
  }
  return need;
}

// Of a pair without a backward, which holds its bytes during F only.
// REQUIRES: one fits.
int ListScheduler::FastestThatFits(int pair) const {
  const auto choices = graph_.choices_of(pair);
  const int64_t limit = graph_.limit_bytes[graph_.pair_rank[pair]];
  int best = model_.plan().choice[pair];
  for (int c = 0; c < choices.size(); ++c) {
    if (choices[c].activation_bytes <= limit &&
        choices[c].forward_ns < choices[best].forward_ns) {
      best = c;
    }
  }
  return best;
}

// Finds what follows from the ways to run pairs alone, unless they are those
// asked for last.
void ListScheduler::PrepareWays(const Ways& ways) {
  for (const int pair : decided_) SetPair(pair, taken_);
  decided_.clear();
  if (ways.choice == asked_.choice && ways.fused == asked_.fused) return;
  for (int p = 0; p < graph_.pairs; ++p) {
    if (ways.choice[p] != taken_.choice[p] ||
        ways.fused[p] != taken_.fused[p]) {
      SetPair(p, ways);
    }
  }
  asked_ = taken_ = ways;
  PrepareMemory(taken_);
  for (Rank& rank : ranks_) rank.work_ns = 0;
  for (int p = 0; p < graph_.pairs; ++p) {
    const ListModel::Place& place = runs_[p].place;
    ranks_[place.rank].work_ns +=
        runs_[p].length_ns[kForwardTask] +
        (place.has_backward() ? runs_[p].least_backward_ns : 0);
  }
}

void ListScheduler::PrepareMemory(Ways& ways) {
  const SafePlan& plan = model_.plan();
  for (Rank& rank : ranks_) rank.live_bytes = 0;
  // A rank on which everything fits at once needs no further care.
  for (int p = 0; p < graph_.pairs; ++p) {
    int64_t most = std::max(runs_[p].activation_bytes, runs_[p].gradient_bytes);
    if (ways.fused[p] == Ways::kEither) {
      const GraphChoice& choice = graph_.choices_of(p)[ways.choice[p]];
      if (choice.has_backward()) most = std::max(most, choice.backward_bytes);
    }
    ranks_[runs_[p].place.rank].live_bytes += most;
  }
  for (Rank& rank : ranks_) {
    rank.constrained = rank.live_bytes > rank.limit_bytes;
    rank.most_need = 0;
  }
  for (size_t i = 0; i < first_cells_.size(); ++i) {
    const ListModel::Cell& cell = model_.cells_[i];
    const Rank& rank = ranks_[cell.rank];
    if (!rank.constrained) continue;
    CellState& state = first_cells_[i];
    state.frozen_peak = 0;
    state.next = cell.steps_begin;
    state.steps_end = cell.steps_end;
    state.forwards_left = cell.forwards;
    state.frozen_left = cell.frozen;
    state.forwards_first = plan.components[cell.component].forwards_first;
    state.need = FindNeed(cell);
    if (state.need <= rank.limit_bytes) continue;
    for (int step = cell.steps_begin; step < cell.steps_end; ++step) {
      const int p = model_.steps_[step].pair;
      ways.choice[p] = plan.choice[p];
      ways.fused[p] = plan.fused[p];
      SetPair(p, ways);
    }
    state.need = FindNeed(cell);
    PW_CHECK(state.need <= rank.limit_bytes);
  }
  for (const int p : graph_.topological) {
    const Rank& rank = ranks_[runs_[p].place.rank];
    if (runs_[p].place.has_backward() || !rank.constrained) continue;
    if (runs_[p].activation_bytes > rank.limit_bytes) {
      ways.choice[p] = FastestThatFits(p);
      SetPair(p, ways);
    }
    frozen_peak_[p] = runs_[p].activation_bytes;
    for (const int before : model_.frozen_before_[p]) {
      frozen_peak_[p] = std::max(frozen_peak_[p], frozen_peak_[before]);
    }
    for (const int cell : model_.frozen_for_[p]) {
      CellState& state = first_cells_[cell];
      state.frozen_peak = std::max(state.frozen_peak, frozen_peak_[p]);
    }
  }
  for (size_t i = 0; i < first_cells_.size(); ++i) {
    const ListModel::Cell& cell = model_.cells_[i];
    Rank& rank = ranks_[cell.rank];
    if (!rank.constrained) continue;
    CellState& state = first_cells_[i];
    rank.most_need = std::max({rank.most_need, state.need, state.frozen_peak});
    UpdateNeed(state);
  }
}

void ListScheduler::Prepare(const ListRule& rule, const Ways& ways,
                            TaskOrder& order) {
  rule_ = &rule;
  order_ = &order;
  PrepareWays(ways);
  order.tasks.clear();
  order.ways = taken_;
  order.makespan_ns = 0;
  waits_ = first_waits_;
  cells_ = first_cells_;
  backwards_left_ = model_.backwards_;
  begun_.clear();
  open_work_ns_ = 0;
  std::fill(is_begun_.begin(), is_begun_.end(), 0);
  std::fill(step_done_.begin(), step_done_.end(), 0);
  std::fill(fed_.begin(), fed_.end(), 0);
  std::fill(frozen_fed_.begin(), frozen_fed_.end(), 0);
  for (int r = 0; r < graph_.ranks; ++r) {
    Rank& rank = ranks_[r];
    rank.queue.Clear();
    rank.weights.Clear();
    rank.free_ns = 0;
    rank.left_ns = rank.work_ns;
    rank.live_bytes = rank.held_bytes = 0;
    rank.pending_weights_ns = 0;
    rank.pending_weights = 0;
    rank.last_was_forward = false;
    rank.begun.clear();
    next_start_ns_[r] = kNever;
    rank.next_root = 0;
    rank.queued_roots = 0;
    std::sort(rank.sorted_roots.begin(), rank.sorted_roots.end(),
              [&rule](int a, int b) {
                const int64_t key_a = rule.key[3 * a], key_b = rule.key[3 * b];
                return key_a != key_b ? key_a < key_b : a < b;
              });
    FeedRoots(rank);
  }
  strict_ = rule.strict;
  if (strict_) SortStrict();
}

void ListScheduler::SortStrict() {
  for (Rank& rank : ranks_) {
    rank.strict_order.clear();
    rank.strict_next = 0;
  }
  for (int p = 0; p < graph_.pairs; ++p) {
    const int kinds = graph_.mode[p] == PairMode::kForwardOnly ? 1
                      : graph_.mode[p] == PairMode::kWhole     ? 2
                                                               : 3;
    std::vector<Task>& order = ranks_[graph_.pair_rank[p]].strict_order;
    for (int kind = 0; kind < kinds; ++kind) {
      const size_t place = rule_->key[3 * p + kind];
      if (place >= order.size()) order.resize(place + 1, -1);
      PW_CHECK(order[place] < 0);
      order[place] = 3 * p + kind;
    }
  }
  for (Rank& rank : ranks_) FeedAllRoots(rank);
}

// Takes the rank's next stage by key; false (and no next start until another
// arrives) when it is not there yet, or when what is strict ends.
bool ListScheduler::PickStrict(int r, Entry& picked) {
  Rank& rank = ranks_[r];
  size_t& next = rank.strict_next;
  const std::vector<Task>& order = rank.strict_order;
  while (next < order.size() &&
         (order[next] < 0 ||
          (TaskKind(order[next]) == kWeightTask &&
           order_->ways.fused[TaskPair(order[next])] == Ways::kFused))) {
    ++next;
  }
  if (next < order.size()) {
    const Task task = order[next];
    Queue& queue = TaskKind(task) == kWeightTask ? rank.weights : rank.queue;
    Entry* const at = queue.Find(task);
    if (at != queue.end()) {
      if (TaskKind(task) != kWeightTask &&
          Admit(rank, *at) != Admission::kYes) {
        strict_ = false;
        UpdateNextStart(r);
        return false;
      }
      ++next;
      picked = queue.Take(at);
      return true;
    }
  }
  next_start_ns_[r] = kNever;
  return false;
}

void ListScheduler::Feed(int pair) {
  if (fed_[pair] != 0) return;
  fed_[pair] = 1;
  ++ranks_[runs_[pair].place.rank].queued_roots;
  Push<kForwardTask>(pair, 0);
}

void ListScheduler::FeedRoots(Rank& rank) {
  while (rank.queued_roots < kQueuedRoots &&
         rank.next_root < rank.sorted_roots.size()) {
    Feed(rank.sorted_roots[rank.next_root++]);
  }
}

void ListScheduler::FeedAllRoots(Rank& rank) {
  while (rank.next_root < rank.sorted_roots.size()) {
    Feed(rank.sorted_roots[rank.next_root++]);
  }
}

void ListScheduler::Begin(int component) {
  is_begun_[component] = 1;
  begun_.push_back(component);
  for (int cell = model_.cell_begin_[component];
       cell < model_.cell_begin_[component + 1]; ++cell) {
    ranks_[model_.cells_[cell].rank].begun.push_back(cell);
  }
  open_work_ns_ += model_.component_work_ns(component);
  const std::vector<int32_t>& roots = model_.roots_[component];
  BeginPushes(static_cast<int>(roots.size()));
  for (const int pair : roots) Feed(pair);
  EndPushes();
  if (model_.all_backward_) return;
  std::vector<int32_t> reached = model_.plan().components[component].sweeps;
  while (!reached.empty()) {
    const int sweep = reached.back();
    reached.pop_back();
    const int first = graph_.sweep_first_pair[sweep];
    const auto producers = graph_.producers_of(first);
    if (producers.size() == 0 && !graph_.has_backward(first)) Feed(first);
    for (const GraphEdge& edge : producers) {
      const int before = graph_.pair_sweep[edge.pair];
      if (graph_.has_backward(edge.pair) || frozen_fed_[before] != 0) continue;
      frozen_fed_[before] = 1;
      reached.push_back(before);
    }
  }
}

template <int kKind>
inline void ListScheduler::Push(int pair, int64_t arrival_ns) {
  const PairRun& run = runs_[pair];
  const int r = run.place.rank;
  Rank& rank = ranks_[r];
  Queue& queue = kKind == kWeightTask ? rank.weights : rank.queue;
  const Task task = 3 * pair + kKind;
  if (kKind == kForwardTask && !rule_->not_before_ns.empty()) {
    arrival_ns = std::max(arrival_ns, rule_->not_before_ns[pair]);
  }
  const Entry entry = {
      .key = rule_->key[task],
      .arrival_ns = arrival_ns,
      .more_bytes = kKind == kForwardTask
                        ? run.activation_bytes
                        : run.gradient_bytes - run.activation_bytes,
      .task = task,
      .component = kKind == kForwardTask ? run.place.component : -1};
  if (append_) {
    queue.Append(entry);
  } else {
    queue.Insert(entry);
  }
  next_start_ns_[r] =
      std::min(next_start_ns_[r], std::max(rank.free_ns, arrival_ns));
}

void ListScheduler::BeginPushes(int count) { append_ = count > kManyReady; }

void ListScheduler::EndPushes() {
  if (!append_) return;
  append_ = false;
  for (Rank& rank : ranks_) rank.queue.SortAppended();
}

// While F are left to run, a component may need all it ever needs.
inline void ListScheduler::UpdateNeed(CellState& state) const {
  if (state.frozen_left > 0) {
    state.need_now = std::max(state.need, state.frozen_peak);
  } else if (state.forwards_left > 0 && state.forwards_first) {
    state.need_now = state.need;
  } else {
    state.need_now =
        state.next < state.steps_end ? suffix_need_[state.next] : 0;
  }
}

bool ListScheduler::MayBegin(int component) const {
  return open_work_ns_ < rule_->open_work_ns || is_begun_[component] != 0;
}

// Components that waited for others to finish may begin from now on.
void ListScheduler::Finish(int component, int64_t now_ns) {
  begun_.erase(std::find(begun_.begin(), begun_.end(), component));
  for (int cell = model_.cell_begin_[component];
       cell < model_.cell_begin_[component + 1]; ++cell) {
    std::vector<int32_t>& begun = ranks_[model_.cells_[cell].rank].begun;
    begun.erase(std::find(begun.begin(), begun.end(), cell));
  }
  const bool was_full = open_work_ns_ >= rule_->open_work_ns;
  open_work_ns_ -= model_.component_work_ns(component);
  if (!was_full) return;
  for (int r = 0; r < graph_.ranks; ++r) {
    bool waits = false;
    for (Entry& entry : ranks_[r].queue) {
      if (entry.component < 0 || is_begun_[entry.component] != 0) continue;
      entry.arrival_ns = std::max(entry.arrival_ns, now_ns);
      waits = true;
    }
    if (waits) UpdateNextStart(r);
  }
}

// Whether the rule in the header still holds after the component of `cell`
// holds `bytes` more on `rank`, its own.
inline bool ListScheduler::SafeToHold(const Rank& rank, int cell,
                                      int64_t bytes) const {
  const CellState& own = cells_[cell];
  if (own.frozen_left > 0 && own.held + bytes + own.frozen_peak >
                                 std::max(own.need, own.frozen_peak)) {
    return false;
  }
  return rank.held_bytes + bytes + rank.most_need <= rank.limit_bytes ||
         SafeBehindOlder(rank, cell, bytes);
}

bool ListScheduler::SafeBehindOlder(const Rank& rank, int cell,
                                    int64_t bytes) const {
  const int64_t limit = rank.limit_bytes;
  // From the oldest on, ever less is behind, so that in the end all is safe.
  int64_t behind = rank.held_bytes + bytes;
  for (const int older : rank.begun) {
    if (older == cell) break;
    const CellState& state = cells_[older];
    behind -= state.held;
    if (behind + state.need_now > limit) return false;
    if (behind + rank.most_need <= limit) break;
  }
  // A component that is older than all that stand on this rank needs what is
  // behind it to fit.
  const bool oldest_stands_here =
      begun_.empty() ||
      (!rank.begun.empty() &&
       model_.cells_[rank.begun.front()].component == begun_.front());
  return oldest_stands_here || rank.held_bytes + bytes <= limit;
}

// Whether `task` comes next on its rank by its component's safe plan.
bool ListScheduler::IsNextStep(Task task) const {
  const int pair = TaskPair(task);
  const SafeStep& step = model_.steps_[cells_[runs_[pair].place.cell].next];
  return step.pair == pair &&
         step.backward == (TaskKind(task) == kGradientTask);
}

// REQUIRES: no W.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline ListScheduler::Admission
ListScheduler::Admit(const Rank& rank, const Entry& entry) const {
  if (entry.component >= 0 && !MayBegin(entry.component)) return Admission::kNo;
  if (!rank.constrained) return Admission::kYes;
  if (!model_.all_forwards_first_) {
    const ListModel::Place& place = runs_[TaskPair(entry.task)].place;
    if (place.component >= 0 && !place.forwards_first &&
        !IsNextStep(entry.task)) {
      return Admission::kNo;
    }
  }
  if (entry.component >= 0 &&
      !SafeToHold(rank, runs_[TaskPair(entry.task)].place.cell,
                  entry.more_bytes)) {
    return Admission::kNo;
  }
  if (rank.live_bytes + entry.more_bytes <= rank.limit_bytes) {
    return Admission::kYes;
  }
  return rank.pending_weights > 0 ? Admission::kAfterWeightGrad
                                  : Admission::kNo;
}

void ListScheduler::DecideFused(const Rank& rank, int pair) {
  Ways& ways = order_->ways;
  const GraphChoice& choice = graph_.choices_of(pair)[ways.choice[pair]];
  const bool fuse =
      graph_.mode[pair] == PairMode::kSplit && choice.has_backward() &&
      rank.pending_weights_ns >= rule_->weight_reserve_ns &&
      (!rank.constrained ||
       rank.live_bytes - choice.activation_bytes + choice.backward_bytes <=
           rank.limit_bytes);
  ways.fused[pair] = fuse ? Ways::kFused : Ways::kApart;
  if (!fuse) return;
  SetPair(pair, ways);
  decided_.push_back(pair);
}

inline void ListScheduler::SettleForward(Rank& rank, int pair) {
  const ListModel::Place& place = runs_[pair].place;
  if (place.component >= 0 && is_begun_[place.component] == 0) {
    Begin(place.component);
  }
  if (!rank.constrained) return;
  if (place.component < 0) {
    for (const int cell : model_.frozen_for_[pair]) {
      --cells_[cell].frozen_left;
      UpdateNeed(cells_[cell]);
    }
    return;
  }
  CellState& state = cells_[place.cell];
  const int64_t bytes = runs_[pair].activation_bytes;
  state.held += bytes;
  rank.held_bytes += bytes;
  rank.live_bytes += bytes;
  --state.forwards_left;
  if (!place.forwards_first) ++state.next;
  UpdateNeed(state);
}

inline void ListScheduler::SettleGradient(Rank& rank, int pair,
                                          int64_t end_ns) {
  const ListModel::Place& place = runs_[pair].place;
  if (--backwards_left_[place.component] == 0) {
    Finish(place.component, end_ns);
  }
  if (!rank.constrained) return;
  const PairRun& run = runs_[pair];
  CellState& state = cells_[place.cell];
  state.held -= run.activation_bytes;
  rank.held_bytes -= run.activation_bytes;
  rank.live_bytes += run.weight_bytes - run.activation_bytes;
  step_done_[place.backward_step] = 1;
  while (state.next < state.steps_end && step_done_[state.next] != 0) {
    ++state.next;
  }
  UpdateNeed(state);
}

ABSL_ATTRIBUTE_ALWAYS_INLINE inline void ListScheduler::Execute(
    int r, const Entry& entry) {
  Rank& rank = ranks_[r];
  const int pair = TaskPair(entry.task);
  const int kind = TaskKind(entry.task);
  if (kind == kGradientTask && order_->ways.fused[pair] == Ways::kEither) {
    const int64_t least_ns = runs_[pair].least_backward_ns;
    DecideFused(rank, pair);
    runs_[pair].least_backward_ns = least_ns;
  }
  const ListModel::Place& place = runs_[pair].place;
  const PairRun& run = runs_[pair];
  // An F that was held back, or whose component had to wait for others, could
  // have begun before: nothing in the schedule keeps it.
  const int64_t arrival_ns =
      kind == kForwardTask ? waits_[pair].forward_ready_ns : entry.arrival_ns;
  const int64_t end = std::max(rank.free_ns, arrival_ns) + run.length_ns[kind];
  rank.free_ns = end;
  order_->tasks.push_back(entry.task);

  if (kind != kWeightTask) rank.last_was_forward = kind == kForwardTask;
  if (kind == kForwardTask) {
    rank.left_ns -= run.length_ns[kForwardTask];
    SettleForward(rank, pair);
    if (place.is_root) {
      --rank.queued_roots;
      FeedRoots(rank);
    }
    BeginPushes(place.consumers.size());
    for (const GraphEdge& edge : place.consumers) {
      PairWaits& waits = waits_[edge.pair];
      waits.forward_ready_ns =
          std::max(waits.forward_ready_ns, end + edge.delay_ns);
      if (--waits.forward == 0) {
        Push<kForwardTask>(edge.pair, waits.forward_ready_ns);
      }
    }
    EndPushes();
    if (place.has_backward()) ArriveGradient(pair, end);
  } else if (kind == kGradientTask) {
    rank.left_ns -= run.least_backward_ns;
    SettleGradient(rank, pair, end);
    if (place.mode == PairMode::kSplit &&
        order_->ways.fused[pair] == Ways::kApart) {
      rank.left_ns += run.length_ns[kWeightTask];
      ++rank.pending_weights;
      rank.pending_weights_ns += run.length_ns[kWeightTask];
      Push<kWeightTask>(pair, end);
    }
    BeginPushes(place.producers.size());
    for (const GraphEdge& edge : place.producers) {
      if (runs_[edge.pair].place.has_backward()) {
        ArriveGradient(edge.pair, end + edge.delay_ns);
      }
    }
    EndPushes();
  } else {
    rank.left_ns -= run.length_ns[kWeightTask];
    --rank.pending_weights;
    rank.pending_weights_ns -= run.length_ns[kWeightTask];
    rank.live_bytes -= run.weight_bytes;
  }
  UpdateNextStart(r);
}

inline void ListScheduler::ArriveGradient(int pair, int64_t at_ns) {
  PairWaits& waits = waits_[pair];
  waits.gradient_ready_ns = std::max(waits.gradient_ready_ns, at_ns);
  if (--waits.gradient == 0) {
    Push<kGradientTask>(pair, waits.gradient_ready_ns);
  }
}

inline void ListScheduler::UpdateNextStart(int r) {
  const Rank& rank = ranks_[r];
  if (!rank.weights.empty()) {
    next_start_ns_[r] = rank.free_ns;
    return;
  }
  int64_t next = kNever;
  for (const Entry& entry : rank.queue) {
    if (entry.arrival_ns <= rank.free_ns) {
      next_start_ns_[r] = rank.free_ns;
      return;
    }
    next = std::min(next, entry.arrival_ns);
  }
  next_start_ns_[r] = next;
}

// Takes the first stage that is ready of the kind that did not run last.
bool ListScheduler::PickInTurn(int r, Entry& picked) {
  Rank& rank = ranks_[r];
  const int wanted = rank.last_was_forward ? kGradientTask : kForwardTask;
  for (Entry& entry : rank.queue) {
    if (TaskKind(entry.task) == wanted &&
        entry.arrival_ns <= next_start_ns_[r] &&
        Admit(rank, entry) == Admission::kYes) {
      picked = rank.queue.Take(&entry);
      return true;
    }
  }
  return false;
}

// Takes the stage that rank `r` starts at next_start_ns_; false (and a later
// next start) when none is to start then.
ABSL_ATTRIBUTE_ALWAYS_INLINE inline bool ListScheduler::Pick(int r,
                                                             Entry& picked) {
  if (rule_->alternate && PickInTurn(r, picked)) return true;
  const int64_t now = next_start_ns_[r];
  Rank& rank = ranks_[r];
  Queue& queue = rank.queue;
  Queue& weights = rank.weights;
  int64_t awaited_ns = kNever;  // the least arrival among those of less key
  int64_t later_ns = kNever;    // the least arrival after now
  const auto wait_instead = [&](Task task) {
    if (awaited_ns == kNever) return false;
    const int64_t length = runs_[TaskPair(task)].length_ns[TaskKind(task)];
    // In parts, so that long times do not overflow.
    return now + length > awaited_ns &&
           awaited_ns - now <=
               length / kPatienceOne * rule_->patience +
                   length % kPatienceOne * rule_->patience / kPatienceOne;
  };
  Entry* at = queue.begin();
  Entry* weight = weights.begin();
  while (at != queue.end() || weight != weights.end()) {
    if (weight != weights.end() && (at == queue.end() || *weight < *at)) {
      if (wait_instead(weight->task)) {
        ++weight;
        continue;
      }
      picked = weights.Take(weight);
      return true;
    }
    if (at->arrival_ns > now) {
      later_ns = std::min(later_ns, at->arrival_ns);
      if (rule_->patience > 0 && at->arrival_ns < awaited_ns &&
          Admit(rank, *at) == Admission::kYes) {
        awaited_ns = at->arrival_ns;
      }
      ++at;
      continue;
    }
    const Admission admission = Admit(rank, *at);
    if (admission == Admission::kAfterWeightGrad) {
      picked = weights.Take(weights.begin());
      return true;
    }
    if (admission == Admission::kYes && !wait_instead(at->task)) {
      picked = queue.Take(at);
      return true;
    }
    ++at;
  }
  next_start_ns_[r] = later_ns;
  return false;
}

void ListScheduler::Run(const ListRule& rule, const Ways& ways,
                        TaskOrder& order, int64_t worth_ns) {
  Prepare(rule, ways, order);
  bool all_fed = false;
  while (true) {
    const int first = FirstOfLeast(next_start_ns_);
    if (next_start_ns_[first] != kNever) {
      Entry entry;
      if (!(strict_ ? PickStrict(first, entry) : Pick(first, entry))) continue;
      Execute(first, entry);
      all_fed = false;
      const Rank& rank = ranks_[first];
      if (rank.free_ns + rank.left_ns > worth_ns) {
        order.tasks.clear();
        order.makespan_ns = kNever;
        return;
      }
      continue;
    }
    bool left = false;
    for (const Rank& rank : ranks_) {
      left = left || !rank.queue.empty() ||
             rank.next_root < rank.sorted_roots.size();
    }
    if (!left) break;
    if (strict_) {
      // The ranks wait for each other, or memory did not admit a stage.
      strict_ = false;
      for (int r = 0; r < graph_.ranks; ++r) UpdateNextStart(r);
      continue;
    }
    // A component begun on another rank since can admit what was refused; so
    // can first stages that were held back.
    PW_CHECK(!all_fed);
    all_fed = true;
    for (int r = 0; r < graph_.ranks; ++r) {
      FeedAllRoots(ranks_[r]);
      UpdateNextStart(r);
    }
  }
  for (const Rank& rank : ranks_) {
    order.makespan_ns = std::max(order.makespan_ns, rank.free_ns);
  }
}

int64_t TaskLength(const ProblemGraph& graph, const Ways& ways, Task task) {
  const int pair = TaskPair(task);
  const GraphChoice& choice = graph.choices_of(pair)[ways.choice[pair]];
  switch (TaskKind(task)) {
    case kForwardTask:
      return choice.forward_ns;
    case kGradientTask:
      return graph.mode[pair] == PairMode::kSplit && ways.fused[pair] == 0
                 ? choice.input_grad_ns
                 : choice.backward_ns;
    default:
      return choice.weight_grad_ns;
  }
}

Schedule ToSchedule(const ProblemGraph& graph, const TaskOrder& order) {
  Schedule schedule;
  schedule.ranks.resize(graph.ranks);
  for (const Task task : order.tasks) {
    const int pair = TaskPair(task);
    ScheduledStage entry;
    entry.sweep = graph.pair_sweep[pair];
    entry.stage = graph.stage_index(pair);
    entry.choice = order.ways.choice[pair];
    switch (TaskKind(task)) {
      case kForwardTask:
        entry.kind = StageKind::kForward;
        break;
      case kGradientTask:
        entry.kind = graph.mode[pair] == PairMode::kSplit &&
                             order.ways.fused[pair] == Ways::kApart
                         ? StageKind::kInputGrad
                         : StageKind::kBackward;
        break;
      default:
        entry.kind = StageKind::kWeightGrad;
        break;
    }
    schedule.ranks[graph.pair_rank[pair]].push_back(entry);
  }
  return schedule;
}

std::optional<TaskOrder> FromSchedule(const ProblemGraph& graph,
                                      const Schedule& schedule) {
  const absl::StatusOr<StageTimes> times = TimeSchedule(graph, schedule);
  if (!times.ok() || !CheckMemory(graph, schedule).ok()) return std::nullopt;
  TaskOrder order;
  order.makespan_ns = times->makespan_ns;
  order.ways.choice.assign(graph.pairs, 0);
  order.ways.fused.assign(graph.pairs, Ways::kApart);
  std::vector<std::vector<Task>> ranks(graph.ranks);
  std::vector<int32_t> waits(3 * static_cast<size_t>(graph.pairs), 1);
  for (int p = 0; p < graph.pairs; ++p) {
    waits[3 * p + kForwardTask] = graph.producers_of(p).size();
    waits[3 * p + kGradientTask] += graph.consumers_of(p).size();
  }
  for (int r = 0; r < graph.ranks; ++r) {
    for (const ScheduledStage& stage : schedule.ranks[r]) {
      const int p = graph.sweep_first_pair[stage.sweep] + stage.stage;
      int kind = kGradientTask;
      if (stage.kind == StageKind::kForward) {
        kind = kForwardTask;
        order.ways.choice[p] = stage.choice;
      } else if (stage.kind == StageKind::kWeightGrad) {
        kind = kWeightTask;
      } else if (stage.kind == StageKind::kBackward &&
                 graph.mode[p] == PairMode::kSplit) {
        order.ways.fused[p] = Ways::kFused;
      }
      ranks[r].push_back(3 * p + kind);
    }
  }
  const auto run = [&](Task task) {
    order.tasks.push_back(task);
    const int p = TaskPair(task);
    if (TaskKind(task) == kForwardTask) {
      --waits[3 * p + kGradientTask];
      for (const GraphEdge& edge : graph.consumers_of(p)) {
        --waits[3 * edge.pair + kForwardTask];
      }
    } else if (TaskKind(task) == kGradientTask) {
      --waits[3 * p + kWeightTask];
      for (const GraphEdge& edge : graph.producers_of(p)) {
        --waits[3 * edge.pair + kGradientTask];
      }
    }
  };
  // The schedule runs, so some rank can always go on until all are done.
  std::vector<size_t> next(graph.ranks, 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (int r = 0; r < graph.ranks; ++r) {
      while (next[r] < ranks[r].size() && waits[ranks[r][next[r]]] == 0) {
        run(ranks[r][next[r]++]);
        moved = true;
      }
    }
  }
  return order;
}

}  // namespace pipeweaver::search
