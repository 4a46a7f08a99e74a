// The list scheduling engine; see list_scheduler.h.

#include "search/strategy/list_scheduler.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "search/strategy/safe_plan.h"
#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
// First stages that wait in a rank's queue at a time, besides those of
// components begun.
constexpr int kQueuedRoots = 4;
constexpr int kPatienceOne = 256;

}  // namespace

ListModel::ListModel(const ProblemGraph& graph, const SafePlan& plan)
    : graph_(graph), plan_(plan) {
  const int components = static_cast<int>(plan.components.size());
  cells_.resize(static_cast<size_t>(components) * graph.ranks);
  backward_step_.assign(graph.pairs, -1);
  component_.resize(graph.pairs);
  rank_roots_.resize(graph.ranks);
  roots_.resize(components);
  frozen_for_.resize(graph.sweeps);
  for (int p = 0; p < graph.pairs; ++p) {
    component_[p] = plan.component_of_sweep[graph.pair_sweep[p]];
    if (graph.producers_of(p).size() == 0) {
      rank_roots_[graph.pair_rank[p]].push_back(p);
      if (component_[p] >= 0) roots_[component_[p]].push_back(p);
    }
  }
  std::vector<std::vector<SafeStep>> by_rank(graph.ranks);
  for (int c = 0; c < components; ++c) {
    for (auto& steps : by_rank) steps.clear();
    const SafeComponent& component = plan.components[c];
    for (const SafeStep& step : component.steps) {
      const int r = graph.pair_rank[step.pair];
      if (!step.backward) ++cells_[c * graph.ranks + r].forwards;
      if (step.backward || !component.forwards_first) {
        by_rank[r].push_back(step);
      }
    }
    for (int r = 0; r < graph.ranks; ++r) {
      Cell& cell = cells_[c * graph.ranks + r];
      cell.steps_begin = static_cast<int32_t>(steps_.size());
      for (const SafeStep& step : by_rank[r]) {
        if (step.backward) {
          backward_step_[step.pair] = static_cast<int32_t>(steps_.size());
        }
        steps_.push_back(step);
      }
      cell.steps_end = static_cast<int32_t>(steps_.size());
    }
    // Sweeps without a backward that this component waits for.
    std::vector<int32_t> stack;
    std::vector<uint8_t> seen(graph.sweeps, 0);
    const auto visit_producers = [&](int sweep) {
      for (const GraphEdge& edge :
           graph.producers_of(graph.sweep_first_pair[sweep])) {
        const int before = graph.pair_sweep[edge.pair];
        if (plan.component_of_sweep[before] >= 0 || seen[before] != 0) continue;
        seen[before] = 1;
        stack.push_back(before);
      }
    };
    for (const int sweep : component.sweeps) visit_producers(sweep);
    while (!stack.empty()) {
      const int sweep = stack.back();
      stack.pop_back();
      frozen_for_[sweep].push_back(c);
      const int first = graph.sweep_first_pair[sweep];
      if (graph.producers_of(first).size() == 0) roots_[c].push_back(first);
      for (int p = first; p < graph.sweep_first_pair[sweep + 1]; ++p) {
        ++cells_[c * graph.ranks + graph.pair_rank[p]].frozen;
      }
      visit_producers(sweep);
    }
  }
}

int64_t ListModel::NeedAlone(int component, int rank, const Ways& ways) const {
  const Cell& cell = cells_[component * graph_.ranks + rank];
  const bool forwards_first = plan_.components[component].forwards_first;
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
  lengths_.resize(graph_.pairs);
  bytes_.resize(graph_.pairs);
  suffix_need_.resize(model.steps_.size());
  step_done_.resize(model.steps_.size());
  cells_.resize(model.cells_.size());
  constrained_.resize(graph_.ranks);
  most_need_.resize(graph_.ranks);
  live_.resize(graph_.ranks);
  held_.resize(graph_.ranks);
  pending_weights_.resize(graph_.ranks);
  pending_weights_ns_.resize(graph_.ranks);
  queue_.resize(graph_.ranks);
  strict_order_.resize(graph_.ranks);
  strict_next_.resize(graph_.ranks);
  last_was_forward_.resize(graph_.ranks);
  free_ns_.resize(graph_.ranks);
  next_start_ns_.resize(graph_.ranks);
  forward_waits_.resize(graph_.pairs);
  gradient_waits_.resize(graph_.pairs);
  forward_ready_ns_.resize(graph_.pairs);
  gradient_ready_ns_.resize(graph_.pairs);
  sorted_roots_ = model.rank_roots_;
  next_root_.resize(graph_.ranks);
  queued_roots_.resize(graph_.ranks);
  fed_.resize(graph_.pairs);
  is_begun_.resize(components);
  backwards_left_.resize(components);
}

void ListScheduler::SetPair(int pair, const Ways& ways) {
  const GraphChoice& choice = graph_.choices_of(pair)[ways.choice[pair]];
  PairLengths& lengths = lengths_[pair];
  PairBytes& bytes = bytes_[pair];
  const bool splits =
      graph_.mode[pair] == PairMode::kSplit && ways.fused[pair] != Ways::kFused;
  lengths.length[kForwardTask] = choice.forward_ns;
  lengths.length[kGradientTask] =
      splits ? choice.input_grad_ns : choice.backward_ns;
  lengths.length[kWeightTask] = choice.weight_grad_ns;
  bytes.activation = choice.activation_bytes;
  bytes.gradient = BackwardStepBytes(choice, graph_.mode[pair],
                                     ways.fused[pair] == Ways::kFused);
  bytes.weight = splits ? choice.weight_grad_bytes : 0;
}

// Computes the need of a cell from the steps of its safe plan; false when it is
// over the limit.
bool ListScheduler::PrepareCell(int cell_index, int64_t limit) {
  const ListModel::Cell& cell = model_.cells_[cell_index];
  const int component = cell_index / graph_.ranks;
  CellState& state = cells_[cell_index];
  int64_t need = 0;
  if (model_.plan().components[component].forwards_first) {
    // Backwards from the last on: held is what the later ones still hold.
    int64_t held = 0;
    for (int i = cell.steps_end - 1; i >= cell.steps_begin; --i) {
      const PairBytes& bytes = bytes_[model_.steps_[i].pair];
      need = std::max(need, held + bytes.gradient);
      suffix_need_[i] = need;
      held += bytes.activation;
    }
    need = std::max(need, held);
  } else {
    int64_t held = 0;  // before step i; nothing is held after the last one
    for (int i = cell.steps_end - 1; i >= cell.steps_begin; --i) {
      const PairBytes& bytes = bytes_[model_.steps_[i].pair];
      if (model_.steps_[i].backward) {
        need = std::max(need, held + bytes.gradient);
        held += bytes.activation;
      } else {
        need = std::max(need, held);
        held -= bytes.activation;
      }
      suffix_need_[i] = need;
    }
  }
  state.need = need;
  return need <= limit;
}

void ListScheduler::PrepareMemory(Ways& ways) {
  const SafePlan& plan = model_.plan();
  for (int r = 0; r < graph_.ranks; ++r) live_[r] = 0;
  // A rank on which everything fits at once needs no further care.
  for (int p = 0; p < graph_.pairs; ++p) {
    int64_t most = std::max(bytes_[p].activation, bytes_[p].gradient);
    if (ways.fused[p] == Ways::kEither) {
      const GraphChoice& choice = graph_.choices_of(p)[ways.choice[p]];
      if (choice.has_backward()) most = std::max(most, choice.backward_bytes);
    }
    live_[graph_.pair_rank[p]] += most;
  }
  for (int r = 0; r < graph_.ranks; ++r) {
    constrained_[r] = live_[r] > graph_.limit_bytes[r] ? 1 : 0;
    live_[r] = held_[r] = most_need_[r] = 0;
    pending_weights_[r] = 0;
    pending_weights_ns_[r] = 0;
  }
  for (size_t c = 0; c < plan.components.size(); ++c) {
    backwards_left_[c] = 0;
    is_begun_[c] = 0;
    for (int r = 0; r < graph_.ranks; ++r) {
      const int index = static_cast<int>(c) * graph_.ranks + r;
      const ListModel::Cell& cell = model_.cells_[index];
      backwards_left_[c] += cell.forwards;
      if (constrained_[r] == 0) continue;
      CellState& state = cells_[index];
      state.held = 0;
      state.frozen_peak = 0;
      state.next = cell.steps_begin;
      state.forwards_left = cell.forwards;
      state.frozen_left = cell.frozen;
      if (PrepareCell(index, graph_.limit_bytes[r])) continue;
      for (int i = cell.steps_begin; i < cell.steps_end; ++i) {
        const int p = model_.steps_[i].pair;
        ways.choice[p] = plan.choice[p];
        ways.fused[p] = plan.fused[p];
        SetPair(p, ways);
      }
      PW_CHECK(PrepareCell(index, graph_.limit_bytes[r]));
    }
  }
  std::fill(step_done_.begin(), step_done_.end(), 0);
  for (int p = 0; p < graph_.pairs; ++p) {
    const int r = graph_.pair_rank[p];
    if (graph_.has_backward(p) || constrained_[r] == 0) continue;
    if (bytes_[p].activation > graph_.limit_bytes[r]) {
      ways.choice[p] = plan.choice[p];
      SetPair(p, ways);
    }
    for (const int c : model_.frozen_for_[graph_.pair_sweep[p]]) {
      CellState& state = cells_[c * graph_.ranks + r];
      state.frozen_peak = std::max(state.frozen_peak, bytes_[p].activation);
    }
  }
  for (size_t i = 0; i < cells_.size(); ++i) {
    const int r = static_cast<int>(i) % graph_.ranks;
    if (constrained_[r] == 0) continue;
    most_need_[r] =
        std::max({most_need_[r], cells_[i].need, cells_[i].frozen_peak});
  }
  begun_.clear();
}

void ListScheduler::Prepare(const ListRule& rule, const Ways& ways,
                            TaskOrder& order) {
  rule_ = &rule;
  order_ = &order;
  order.tasks.clear();
  order.ways = ways;
  order.makespan_ns = 0;
  for (int p = 0; p < graph_.pairs; ++p) SetPair(p, ways);
  PrepareMemory(order.ways);
  for (int p = 0; p < graph_.pairs; ++p) {
    forward_waits_[p] = graph_.producers_of(p).size();
    gradient_waits_[p] = 1 + graph_.consumers_of(p).size();
    forward_ready_ns_[p] = gradient_ready_ns_[p] = 0;
  }
  std::fill(fed_.begin(), fed_.end(), 0);
  for (int r = 0; r < graph_.ranks; ++r) {
    queue_[r].clear();
    free_ns_[r] = 0;
    last_was_forward_[r] = 0;
    next_start_ns_[r] = kNever;
    next_root_[r] = 0;
    queued_roots_[r] = 0;
    std::sort(sorted_roots_[r].begin(), sorted_roots_[r].end(),
              [&rule](int a, int b) {
                const int64_t key_a = rule.key[3 * a], key_b = rule.key[3 * b];
                return key_a != key_b ? key_a < key_b : a < b;
              });
    FeedRoots(r);
  }
  strict_ = rule.strict;
  if (strict_) SortStrict();
}

void ListScheduler::SortStrict() {
  for (int r = 0; r < graph_.ranks; ++r) {
    strict_order_[r].clear();
    strict_next_[r] = 0;
  }
  for (int p = 0; p < graph_.pairs; ++p) {
    const int kinds = graph_.mode[p] == PairMode::kForwardOnly ? 1
                      : graph_.mode[p] == PairMode::kWhole     ? 2
                                                               : 3;
    for (int kind = 0; kind < kinds; ++kind) {
      strict_order_[graph_.pair_rank[p]].push_back(3 * p + kind);
    }
  }
  for (std::vector<Task>& order : strict_order_) {
    std::sort(order.begin(), order.end(), [this](Task a, Task b) {
      const int64_t key_a = rule_->key[a], key_b = rule_->key[b];
      return key_a != key_b ? key_a < key_b : a < b;
    });
  }
  for (int r = 0; r < graph_.ranks; ++r) {
    while (next_root_[r] < sorted_roots_[r].size()) {
      Feed(sorted_roots_[r][next_root_[r]++]);
    }
  }
}

// Starts the rank's next stage by key; false (and no next start until another
// arrives) when it is not there yet.
bool ListScheduler::DispatchStrict(int rank) {
  size_t& next = strict_next_[rank];
  const std::vector<Task>& order = strict_order_[rank];
  while (next < order.size() && TaskKind(order[next]) == kWeightTask &&
         order_->ways.fused[TaskPair(order[next])] == Ways::kFused) {
    ++next;
  }
  const std::vector<Entry>& queue = queue_[rank];
  for (size_t at = 0; at < queue.size(); ++at) {
    if (next >= order.size() || queue[at].task != order[next]) continue;
    if (Admit(rank, queue[at].task) != Admission::kYes) {
      strict_ = false;
      UpdateNextStart(rank);
      return true;
    }
    ++next;
    Execute(rank, at);
    return true;
  }
  next_start_ns_[rank] = kNever;
  return false;
}

void ListScheduler::Feed(int pair) {
  if (fed_[pair] != 0) return;
  fed_[pair] = 1;
  ++queued_roots_[graph_.pair_rank[pair]];
  Push(3 * pair + kForwardTask, 0);
}

void ListScheduler::FeedRoots(int rank) {
  const std::vector<int32_t>& roots = sorted_roots_[rank];
  while (queued_roots_[rank] < kQueuedRoots &&
         next_root_[rank] < roots.size()) {
    Feed(roots[next_root_[rank]++]);
  }
}

void ListScheduler::Begin(int component) {
  is_begun_[component] = 1;
  begun_.push_back(component);
  for (const int pair : model_.roots_[component]) Feed(pair);
}

void ListScheduler::Push(Task task, int64_t arrival_ns) {
  const int r = graph_.pair_rank[TaskPair(task)];
  const int64_t key = rule_->key[task];
  std::vector<Entry>& queue = queue_[r];
  size_t at = queue.size();
  queue.push_back({key, arrival_ns, task});
  while (at > 0 && (queue[at - 1].key > key ||
                    (queue[at - 1].key == key && queue[at - 1].task > task))) {
    queue[at] = queue[at - 1];
    --at;
  }
  queue[at] = {key, arrival_ns, task};
  next_start_ns_[r] =
      std::min(next_start_ns_[r], std::max(free_ns_[r], arrival_ns));
}

// While F are left to run, a component may need all it ever needs.
int64_t ListScheduler::NeedOf(const CellState& state, int cell_index) const {
  if (state.frozen_left > 0) return std::max(state.need, state.frozen_peak);
  if (state.forwards_left > 0 &&
      model_.plan().components[cell_index / graph_.ranks].forwards_first) {
    return state.need;
  }
  return state.next < model_.cells_[cell_index].steps_end
             ? suffix_need_[state.next]
             : 0;
}

// Whether the rule in the header still holds after `component` holds `bytes`
// more on `rank`.
bool ListScheduler::SafeToHold(int rank, int component, int64_t bytes) const {
  const int64_t limit = graph_.limit_bytes[rank];
  const CellState& own = cells_[component * graph_.ranks + rank];
  if (own.frozen_left > 0 && own.held + bytes + own.frozen_peak >
                                 std::max(own.need, own.frozen_peak)) {
    return false;
  }
  if (held_[rank] + bytes + most_need_[rank] <= limit) return true;
  int64_t behind = 0;
  bool older = is_begun_[component] == 0;
  for (size_t i = begun_.size(); i-- > 0;) {
    const int index = begun_[i] * graph_.ranks + rank;
    const CellState& state = cells_[index];
    if (older && behind + bytes + NeedOf(state, index) > limit) return false;
    behind += state.held;
    if (begun_[i] == component) older = true;
  }
  return true;
}

ListScheduler::Admission ListScheduler::Admit(int rank, Task task) const {
  if (constrained_[rank] == 0) return Admission::kYes;
  const int pair = TaskPair(task);
  const PairBytes& bytes = bytes_[pair];
  const int kind = TaskKind(task);
  if (kind == kWeightTask) return Admission::kYes;
  const int component = model_.component_[pair];
  if (component >= 0 && !model_.plan().components[component].forwards_first) {
    const int index = component * graph_.ranks + rank;
    const SafeStep& step = model_.steps_[cells_[index].next];
    if (step.pair != pair || step.backward != (kind == kGradientTask)) {
      return Admission::kNo;
    }
  }
  int64_t live = live_[rank];
  if (kind == kForwardTask) {
    live += bytes.activation;
    if (component >= 0 && !SafeToHold(rank, component, bytes.activation)) {
      return Admission::kNo;
    }
  } else {
    live += bytes.gradient - bytes.activation;
  }
  if (live <= graph_.limit_bytes[rank]) return Admission::kYes;
  return pending_weights_[rank] > 0 ? Admission::kAfterWeightGrad
                                    : Admission::kNo;
}

void ListScheduler::DecideFused(int rank, int pair) {
  Ways& ways = order_->ways;
  const GraphChoice& choice = graph_.choices_of(pair)[ways.choice[pair]];
  const bool fuse =
      graph_.mode[pair] == PairMode::kSplit && choice.has_backward() &&
      pending_weights_ns_[rank] >= rule_->weight_reserve_ns &&
      (constrained_[rank] == 0 ||
       live_[rank] - choice.activation_bytes + choice.backward_bytes <=
           graph_.limit_bytes[rank]);
  ways.fused[pair] = fuse ? Ways::kFused : Ways::kApart;
  if (fuse) SetPair(pair, ways);
}

void ListScheduler::SettleForward(int rank, int pair) {
  const int component = model_.component_[pair];
  if (component >= 0 && is_begun_[component] == 0) Begin(component);
  if (constrained_[rank] == 0) return;
  if (component < 0) {
    for (const int c : model_.frozen_for_[graph_.pair_sweep[pair]]) {
      --cells_[c * graph_.ranks + rank].frozen_left;
    }
    return;
  }
  CellState& state = cells_[component * graph_.ranks + rank];
  state.held += bytes_[pair].activation;
  held_[rank] += bytes_[pair].activation;
  live_[rank] += bytes_[pair].activation;
  --state.forwards_left;
  if (!model_.plan().components[component].forwards_first) ++state.next;
}

void ListScheduler::SettleGradient(int rank, int pair) {
  const int component = model_.component_[pair];
  if (--backwards_left_[component] == 0) {
    begun_.erase(std::find(begun_.begin(), begun_.end(), component));
  }
  if (constrained_[rank] == 0) return;
  const PairBytes& bytes = bytes_[pair];
  const int index = component * graph_.ranks + rank;
  CellState& state = cells_[index];
  state.held -= bytes.activation;
  held_[rank] -= bytes.activation;
  live_[rank] += bytes.weight - bytes.activation;
  step_done_[model_.backward_step_[pair]] = 1;
  while (state.next < model_.cells_[index].steps_end &&
         step_done_[state.next] != 0) {
    ++state.next;
  }
}

void ListScheduler::Execute(int rank, size_t at) {
  std::vector<Entry>& queue = queue_[rank];
  const Entry entry = queue[at];
  queue.erase(queue.begin() + static_cast<int64_t>(at));
  const int pair = TaskPair(entry.task);
  const int kind = TaskKind(entry.task);
  if (kind == kGradientTask && order_->ways.fused[pair] == Ways::kEither) {
    DecideFused(rank, pair);
  }
  const int64_t start = std::max(free_ns_[rank], entry.arrival_ns);
  const int64_t end = start + lengths_[pair].length[kind];
  free_ns_[rank] = end;
  order_->tasks.push_back(entry.task);
  order_->makespan_ns = std::max(order_->makespan_ns, end);

  if (kind != kWeightTask) last_was_forward_[rank] = kind == kForwardTask;
  if (kind == kForwardTask) {
    SettleForward(rank, pair);
    if (graph_.producers_of(pair).size() == 0) {
      --queued_roots_[rank];
      FeedRoots(rank);
    }
    for (const GraphEdge& edge : graph_.consumers_of(pair)) {
      int64_t& ready = forward_ready_ns_[edge.pair];
      ready = std::max(ready, end + edge.delay_ns);
      if (--forward_waits_[edge.pair] == 0) {
        Push(3 * edge.pair + kForwardTask, ready);
      }
    }
    if (graph_.has_backward(pair)) {
      int64_t& ready = gradient_ready_ns_[pair];
      ready = std::max(ready, end);
      if (--gradient_waits_[pair] == 0) {
        Push(3 * pair + kGradientTask, ready);
      }
    }
  } else if (kind == kGradientTask) {
    SettleGradient(rank, pair);
    if (graph_.mode[pair] == PairMode::kSplit &&
        order_->ways.fused[pair] == Ways::kApart) {
      ++pending_weights_[rank];
      pending_weights_ns_[rank] += lengths_[pair].length[kWeightTask];
      Push(3 * pair + kWeightTask, end);
    }
    for (const GraphEdge& edge : graph_.producers_of(pair)) {
      if (!graph_.has_backward(edge.pair)) continue;
      int64_t& ready = gradient_ready_ns_[edge.pair];
      ready = std::max(ready, end + edge.delay_ns);
      if (--gradient_waits_[edge.pair] == 0) {
        Push(3 * edge.pair + kGradientTask, ready);
      }
    }
  } else {
    --pending_weights_[rank];
    pending_weights_ns_[rank] -= lengths_[pair].length[kWeightTask];
    live_[rank] -= bytes_[pair].weight;
  }
  UpdateNextStart(rank);
}

void ListScheduler::UpdateNextStart(int rank) {
  int64_t next = kNever;
  for (const Entry& entry : queue_[rank]) {
    if (entry.arrival_ns <= free_ns_[rank]) {
      next_start_ns_[rank] = free_ns_[rank];
      return;
    }
    next = std::min(next, entry.arrival_ns);
  }
  next_start_ns_[rank] = next;
}

// Starts the first stage that is ready of the kind that did not run last.
bool ListScheduler::DispatchInTurn(int rank) {
  const int wanted =
      last_was_forward_[rank] != 0 ? kGradientTask : kForwardTask;
  const std::vector<Entry>& queue = queue_[rank];
  for (size_t at = 0; at < queue.size(); ++at) {
    if (TaskKind(queue[at].task) == wanted &&
        queue[at].arrival_ns <= next_start_ns_[rank] &&
        Admit(rank, queue[at].task) == Admission::kYes) {
      Execute(rank, at);
      return true;
    }
  }
  return false;
}

// Starts a stage on `rank` at next_start_ns_; false (and a later next start)
// when none is to start then.
bool ListScheduler::Dispatch(int rank) {
  if (rule_->alternate && DispatchInTurn(rank)) return true;
  const int64_t now = next_start_ns_[rank];
  const std::vector<Entry>& queue = queue_[rank];
  int64_t awaited_ns = kNever;  // the least arrival among those of less key
  int64_t later_ns = kNever;    // the least arrival after now
  bool weight_grad_only = false;
  for (size_t at = 0; at < queue.size(); ++at) {
    const Entry& entry = queue[at];
    const int kind = TaskKind(entry.task);
    if (entry.arrival_ns > now) {
      later_ns = std::min(later_ns, entry.arrival_ns);
      if (rule_->patience > 0 && entry.arrival_ns < awaited_ns &&
          Admit(rank, entry.task) == Admission::kYes) {
        awaited_ns = entry.arrival_ns;
      }
      continue;
    }
    if (weight_grad_only && kind != kWeightTask) continue;
    const Admission admission = Admit(rank, entry.task);
    if (admission == Admission::kNo) continue;
    if (admission == Admission::kAfterWeightGrad) {
      weight_grad_only = true;
      continue;
    }
    const int64_t length = lengths_[TaskPair(entry.task)].length[kind];
    if (!weight_grad_only && awaited_ns != kNever &&
        now + length > awaited_ns &&
        awaited_ns - now <= length / kPatienceOne * rule_->patience) {
      continue;
    }
    Execute(rank, at);
    return true;
  }
  // A weight gradient with a key below the stage that it stands in the way of.
  if (weight_grad_only) {
    for (size_t at = 0; at < queue.size(); ++at) {
      if (queue[at].arrival_ns <= now &&
          TaskKind(queue[at].task) == kWeightTask) {
        Execute(rank, at);
        return true;
      }
    }
  }
  next_start_ns_[rank] = later_ns;
  return false;
}

void ListScheduler::Run(const ListRule& rule, const Ways& ways,
                        TaskOrder& order) {
  Prepare(rule, ways, order);
  bool all_fed = false;
  while (true) {
    int rank = 0;
    for (int r = 1; r < graph_.ranks; ++r) {
      if (next_start_ns_[r] < next_start_ns_[rank]) rank = r;
    }
    if (next_start_ns_[rank] != kNever) {
      if (strict_ ? DispatchStrict(rank) : Dispatch(rank)) all_fed = false;
      continue;
    }
    bool left = false;
    for (int r = 0; r < graph_.ranks; ++r) {
      left =
          left || !queue_[r].empty() || next_root_[r] < sorted_roots_[r].size();
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
      while (next_root_[r] < sorted_roots_[r].size()) {
        Feed(sorted_roots_[r][next_root_[r]++]);
      }
      UpdateNextStart(r);
    }
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

}  // namespace pipeweaver::search
