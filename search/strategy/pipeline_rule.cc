// List rules for pipelines; see pipeline_rule.h.

#include "search/strategy/pipeline_rule.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <queue>
#include <random>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/memory_ways.h"
#include "search/strategy/order_times.h"
#include "search/strategy/safe_plan.h"

namespace pipeweaver::search {
namespace {

constexpr int kPrices = 24;
constexpr int kPriceStride = 3;
// Keys: a group's place takes this much, so that its sweeps fit in between.
constexpr int64_t kGroupStride = int64_t{1} << 20;
constexpr int64_t kFarAhead = int64_t{1} << 50;
constexpr int kMostReserve = 1000000;  // never fuse
constexpr int kReserves[] = {0, 1, 2, 4, 8, 16, 32, kMostReserve};
constexpr int kPatient = 128;
constexpr int kPatienceAgain = 64;  // of second schedules
constexpr int kStretches[] = {0, 4, 6, 8, 12, 16};
constexpr int kMostStretch = 24;
constexpr int kNoStretch = 4;
constexpr int kFirstStretch = 8;
constexpr int kFirstOpen = 16;
constexpr int kOpen[] = {0, 4, 6, 8, 10, 12, 16, 20, 24, 32};
// Prices above one in so many of all are for scarce memory.
constexpr int kScarceShare = 3;
// How long before its time a forward may run where memory is scarce, in the
// mean time until a group that has all ranks to itself starts its last stage.
constexpr double kAhead = 0.7;
// Of the weight of a pair's memory, what goes by how long it held it in the
// schedule before; the rest goes by what was expected.
constexpr double kHeldShare = 0.3;

bool HasPrice(const PipelineRule& rule) {
  return std::any_of(rule.price.begin(), rule.price.end(),
                     [](uint8_t price) { return price > 0; });
}

}  // namespace

PipelineRules::PipelineRules(const ListModel& model)
    : graph_(model.graph()), memory_(graph_) {
  const ProblemGraph& graph = graph_;
  FindGroups(model.plan());
  int64_t weight_grads = 0;
  for (int p = 0; p < graph.pairs; ++p) {
    if (graph.mode[p] != PairMode::kSplit) continue;
    ++weight_grads;
    const auto choices = graph.choices_of(p);
    // A running mean, so that long stages do not overflow.
    mean_weight_grad_ns_ +=
        (choices[0].weight_grad_ns - mean_weight_grad_ns_) / weight_grads;
    for (const GraphChoice& choice : choices) {
      can_fuse_ = can_fuse_ || choice.has_backward();
    }
  }
  const int components = static_cast<int>(model.plan().components.size());
  for (int c = 0; c < components; ++c) {
    mean_component_work_ns_ +=
        (model.component_work_ns(c) - mean_component_work_ns_) / (c + 1);
  }
  for (const bool by_hold : {false, true}) FindPrices(model, by_hold);
  FindScarcity();
  FindAloneTimes();
  FindV();
}

// Every group by itself, first come first served on each rank; weight gradients
// take no time.
void PipelineRules::FindAloneTimes() {
  std::vector<int32_t> by_cell(graph_.pairs);
  std::iota(by_cell.begin(), by_cell.end(), 0);
  const auto key = [this](int p) {
    return std::pair(group_of_sweep_[graph_.pair_sweep[p]],
                     graph_.pair_rank[p]);
  };
  std::sort(by_cell.begin(), by_cell.end(),
            [&](int p, int q) { return key(p) < key(q); });
  std::vector<int32_t> cell_of(graph_.pairs);
  group_work_begin_.assign(groups() + 1, 0);
  for (int i = 0; i < graph_.pairs; ++i) {
    const auto [group, rank] = key(by_cell[i]);
    if (i == 0 || key(by_cell[i - 1]) != key(by_cell[i])) {
      group_work_.push_back({rank, 0});
      ++group_work_begin_[group + 1];
    }
    cell_of[by_cell[i]] = static_cast<int32_t>(group_work_.size()) - 1;
  }
  std::partial_sum(group_work_begin_.begin(), group_work_begin_.end(),
                   group_work_begin_.begin());
  alone_ns_.assign(3 * static_cast<size_t>(graph_.pairs), 0);
  std::vector<int64_t> free_ns(group_work_.size(), 0);
  std::vector<int32_t> waits(3 * static_cast<size_t>(graph_.pairs), 0);
  using Arrival = std::pair<int64_t, Task>;
  std::priority_queue<Arrival, std::vector<Arrival>, std::greater<>> arrivals;
  for (int p = 0; p < graph_.pairs; ++p) {
    waits[3 * p + kForwardTask] = graph_.producers_of(p).size();
    waits[3 * p + kGradientTask] = 1 + graph_.consumers_of(p).size();
    if (waits[3 * p + kForwardTask] == 0) {
      arrivals.emplace(0, 3 * p + kForwardTask);
    }
  }
  const auto arrive = [&](Task task, int64_t at_ns) {
    alone_ns_[task] = std::max(alone_ns_[task], at_ns);
    if (--waits[task] == 0) arrivals.emplace(alone_ns_[task], task);
  };
  while (!arrivals.empty()) {
    const auto [ready_ns, task] = arrivals.top();
    arrivals.pop();
    const int p = TaskPair(task);
    const int cell = cell_of[p];
    const GraphChoice& choice = graph_.choices_of(p)[0];
    const bool split = graph_.mode[p] == PairMode::kSplit;
    int64_t length = choice.forward_ns;
    if (TaskKind(task) == kGradientTask) {
      length = split ? choice.input_grad_ns : choice.backward_ns;
      if (split) group_work_[cell].ns += choice.weight_grad_ns;
    }
    group_work_[cell].ns += length;
    alone_ns_[task] = std::max(ready_ns, free_ns[cell]);
    free_ns[cell] = alone_ns_[task] + length;
    const int64_t end_ns = free_ns[cell];
    if (TaskKind(task) == kForwardTask) {
      for (const GraphEdge& edge : graph_.consumers_of(p)) {
        arrive(3 * edge.pair + kForwardTask, end_ns + edge.delay_ns);
      }
      if (graph_.has_backward(p)) arrive(3 * p + kGradientTask, end_ns);
    } else {
      for (const GraphEdge& edge : graph_.producers_of(p)) {
        if (!graph_.has_backward(edge.pair)) continue;
        arrive(3 * edge.pair + kGradientTask, end_ns + edge.delay_ns);
      }
    }
  }
  std::vector<int64_t> passage_ns(groups(), 0);
  for (int p = 0; p < graph_.pairs; ++p) {
    int64_t& passage = passage_ns[group_of_sweep_[graph_.pair_sweep[p]]];
    passage = std::max({passage, alone_ns_[3 * p + kForwardTask],
                        alone_ns_[3 * p + kGradientTask]});
  }
  double whole_ns = 0;
  for (const int64_t passage : passage_ns) {
    whole_ns += static_cast<double>(passage);
  }
  ahead_ns_ = static_cast<int64_t>(kAhead * whole_ns / groups());
}

void PipelineRules::FindScarcity() {
  if (prices() > 1) return;  // then the price tells
  std::vector<int64_t> bytes(graph_.ranks, 0);
  for (int p = 0; p < graph_.pairs; ++p) {
    if (!graph_.has_backward(p)) continue;
    bytes[graph_.pair_rank[p]] += graph_.choices_of(p)[0].activation_bytes;
  }
  for (int r = 0; r < graph_.ranks; ++r) {
    is_scarce_ = is_scarce_ || bytes[r] > graph_.limit_bytes[r];
  }
}

// A group is due when the busiest rank has done the groups before it, its tasks
// as much later as they would start if it ran alone, stretched where that is
// the rhythm.
void PipelineRules::SetDueTimes(const PipelineRule& rule,
                                std::vector<int64_t>& key) const {
  std::vector<int64_t> due_ns(groups(), 0);
  std::vector<int64_t> done_ns(graph_.ranks, 0);
  int64_t most_done_ns = 0;
  for (const int32_t group : rule.groups) {
    due_ns[group] = most_done_ns;
    for (int i = group_work_begin_[group]; i < group_work_begin_[group + 1];
         ++i) {
      int64_t& done = done_ns[group_work_[i].rank];
      done += group_work_[i].ns;
      most_done_ns = std::max(most_done_ns, done);
    }
  }
  const int stretch =
      rule.rhythm == PipelineRule::Rhythm::kPaced ? rule.stretch : kNoStretch;
  for (int p = 0; p < graph_.pairs; ++p) {
    const int group = group_of_sweep_[graph_.pair_sweep[p]];
    for (const int kind : {kForwardTask, kGradientTask}) {
      key[3 * p + kind] = due_ns[group] + alone_ns_[3 * p + kind] / 4 * stretch;
    }
  }
}

void PipelineRules::FindPrices(const ListModel& model, bool by_hold) {
  PriceLadder& ladder = ladders_[by_hold];
  ladder.weights =
      by_hold ? HoldWeights(graph_) : std::vector<double>(graph_.pairs, 1);
  ladder.prices = memory_.Typical(ladder.weights, kPrices);

  std::vector<uint8_t> least(model.cells(), 0);
  std::vector<int32_t> too_large(least.size());
  std::iota(too_large.begin(), too_large.end(), 0);
  for (size_t price = 0; price + 1 < ladder.prices.size(); ++price) {
    Ways ways = memory_.AllAt(ladder.weights, ladder.prices[price]);
    // Backwards count as split, as they may be.
    std::fill(ways.fused.begin(), ways.fused.end(), Ways::kApart);
    std::erase_if(too_large, [&](int32_t cell) {
      return model.NeedAlone(cell, ways) <=
             graph_.limit_bytes[model.cell_rank(cell)];
    });
    if (too_large.empty()) break;
    for (const int32_t cell : too_large) {
      least[cell] = static_cast<uint8_t>(price + 1);
    }
  }
  ladder.least.assign(graph_.pairs, 0);
  for (int p = 0; p < graph_.pairs; ++p) {
    const int cell = model.cell_of(p);
    if (cell >= 0) ladder.least[p] = least[cell];
  }
}

void PipelineRules::FindGroups(const SafePlan& plan) {
  group_of_sweep_ = plan.component_of_sweep;
  int groups = static_cast<int>(plan.components.size());
  depth_.assign(graph_.sweeps, 0);
  std::vector<int32_t> sweeps;  // producers first
  for (const int p : graph_.topological) {
    const int s = graph_.pair_sweep[p];
    if (p != graph_.sweep_first_pair[s]) continue;
    sweeps.push_back(s);
    for (const GraphEdge& edge : graph_.producers_of(p)) {
      depth_[s] = std::max(depth_[s], depth_[graph_.pair_sweep[edge.pair]] + 1);
    }
  }
  // A sweep without a backward joins its first consumer's group.
  for (size_t i = sweeps.size(); i-- > 0;) {
    const int s = sweeps[i];
    if (group_of_sweep_[s] >= 0) continue;
    const auto consumers =
        graph_.consumers_of(graph_.sweep_first_pair[s + 1] - 1);
    if (consumers.size() > 0) {
      group_of_sweep_[s] =
          group_of_sweep_[graph_.pair_sweep[consumers[0].pair]];
    } else {
      group_of_sweep_[s] = groups++;
    }
  }
  group_work_ns_.assign(groups, 0);
  for (int p = 0; p < graph_.pairs; ++p) {
    group_work_ns_[group_of_sweep_[graph_.pair_sweep[p]]] +=
        graph_.choices_of(p)[0].forward_ns;
  }
}

// The per-rank order of the zero-bubble V schedule (Qi et al. 2024, "Pipeline
// Parallelism with Controllable Memory", as run by PyTorch's ZBV schedule):
// warm-up, steady state and cool-down are fixed counts of each kind.
void PipelineRules::FindV() {
  const int ranks = graph_.ranks;
  const int m = groups();
  std::vector<int> sweeps_of_group(m, 0);
  for (int s = 0; s < graph_.sweeps; ++s) {
    if (depth_[s] > 1) return;
    ++sweeps_of_group[group_of_sweep_[s]];
    const int first = graph_.sweep_first_pair[s];
    if (graph_.sweep_first_pair[s + 1] - first != ranks) return;
    for (int k = 0; k < ranks; ++k) {
      if (graph_.pair_rank[first + k] != (depth_[s] == 0 ? k : ranks - 1 - k) ||
          graph_.mode[first + k] != PairMode::kSplit) {
        return;
      }
    }
  }
  if (std::any_of(sweeps_of_group.begin(), sweeps_of_group.end(),
                  [](int n) { return n != 2; })) {
    return;
  }
  is_v_ = true;
  v_place_.assign(static_cast<size_t>(ranks) * 2 * m * 3, 0);
  // The form needs 2 * ranks - 1 groups; with fewer, the others drop out.
  const int n = std::max(2 * ranks - 1, m);
  for (int rank = 0; rank < ranks; ++rank) {
    int place = 0;
    int done[2][3] = {};
    const auto add = [&](int chunk, int kind) {
      const int group = done[chunk][kind]++;
      ++place;
      if (group >= m) return;
      v_place_[((static_cast<size_t>(rank) * 2 + chunk) * m + group) * 3 +
               kind] = place;
    };
    const auto backward = [&](int chunk) {
      add(chunk, kGradientTask);
      add(chunk, kWeightTask);
    };
    for (int i = 0; i < 2 * (ranks - rank) - 1; ++i) add(0, kForwardTask);
    for (int i = 0; i < rank; ++i) {
      add(1, kForwardTask);
      add(0, kForwardTask);
    }
    for (int i = 0; i < ranks - rank; ++i) {
      add(1, kForwardTask);
      backward(1);
    }
    while (done[1][kForwardTask] < done[0][kForwardTask] ||
           done[0][kForwardTask] < n) {
      if (done[0][kForwardTask] < n) add(0, kForwardTask);
      backward(0);
      add(1, kForwardTask);
      backward(1);
    }
    for (int i = 0; i < rank; ++i) {
      add(0, kGradientTask);
      add(1, kGradientTask);
    }
    for (int i = 0; i < ranks - rank; ++i) {
      add(0, kGradientTask);
      add(0, kWeightTask);
    }
    while (done[1][kWeightTask] < n) add(1, kWeightTask);
    while (done[0][kWeightTask] < n) add(0, kWeightTask);
  }
}

std::vector<PipelineRule> PipelineRules::FirstRules() const {
  PipelineRule rule;
  rule.groups = Groups(rule.group_order);
  rule.price.assign(graph_.ranks, 0);
  rule.split_groups = std::min(groups(), graph_.ranks);
  rule.reserve = graph_.ranks;
  rule.lag = graph_.ranks;
  rule.stretch = kFirstStretch;
  std::vector<PipelineRule> rules = {rule};
  AddRhythms(rule, rules);
  // Where memory is short, what it costs decides more than any order.
  rule.rhythm = PipelineRule::Rhythm::kPaced;
  for (const int third : {1, 2, 3}) {
    const int price = (prices() - 1) * third / 3;
    if (price == rule.price.front()) continue;
    rule.price.assign(graph_.ranks, static_cast<uint8_t>(price));
    for (const int open : {0, kFirstOpen}) {
      rule.open = open;
      rules.push_back(rule);
    }
  }
  return rules;
}

void PipelineRules::AddRhythms(PipelineRule rule,
                               std::vector<PipelineRule>& rules) const {
  rule.rhythm = PipelineRule::Rhythm::kPaced;
  rules.push_back(rule);
  if (is_v_) {
    rule.rhythm = PipelineRule::Rhythm::kZeroBubbleV;
    rules.push_back(rule);
  }
  rule.rhythm = PipelineRule::Rhythm::kLag;
  rules.push_back(rule);
}

std::vector<int32_t> PipelineRules::Groups(
    PipelineRule::GroupOrder order) const {
  const int m = groups();
  std::vector<int32_t> rising(m);
  std::iota(rising.begin(), rising.end(), 0);
  if (order == PipelineRule::GroupOrder::kAsGiven) return rising;
  std::stable_sort(rising.begin(), rising.end(), [this](int a, int b) {
    return group_work_ns_[a] < group_work_ns_[b];
  });
  if (order == PipelineRule::GroupOrder::kRising) return rising;
  if (order == PipelineRule::GroupOrder::kSteepHill) {
    // The smaller half rises, the larger falls behind it.
    std::reverse(rising.begin() + m / 2, rising.end());
    return rising;
  }
  // Small groups fill and drain the pipeline, neighbours are alike: every
  // second or third group is on the way down.
  const int every = order == PipelineRule::GroupOrder::kHill ? 2 : 3;
  std::vector<int32_t> hill, down;
  for (int i = 0; i < m; ++i) {
    (i % every == every - 1 ? down : hill).push_back(rising[i]);
  }
  hill.insert(hill.end(), down.rbegin(), down.rend());
  return hill;
}

std::vector<std::vector<PipelineRule>> PipelineRules::OtherOrders(
    const PipelineRule& best) const {
  std::vector<std::vector<PipelineRule>> orders;
  if (std::adjacent_find(group_work_ns_.begin(), group_work_ns_.end(),
                         std::not_equal_to<>()) == group_work_ns_.end()) {
    return orders;
  }
  for (const auto order :
       {PipelineRule::GroupOrder::kHill, PipelineRule::GroupOrder::kRising,
        PipelineRule::GroupOrder::kLateHill,
        PipelineRule::GroupOrder::kSteepHill}) {
    PipelineRule rule = best;
    rule.group_order = order;
    rule.groups = Groups(order);
    std::vector<PipelineRule>& rules = orders.emplace_back();
    rules.push_back(rule);
    AddRhythms(rule, rules);
  }
  return orders;
}

std::vector<int32_t> PipelineRules::ToSettings(const PipelineRule& rule) {
  std::vector<int32_t> settings = {static_cast<int32_t>(rule.group_order),
                                   static_cast<int32_t>(rule.rhythm),
                                   rule.lag,
                                   rule.stretch,
                                   static_cast<int32_t>(rule.sweep_order),
                                   rule.by_hold ? 1 : 0,
                                   rule.patience,
                                   rule.split_groups,
                                   rule.reserve,
                                   rule.open,
                                   rule.holds_back ? 1 : 0,
                                   rule.twice ? 1 : 0};
  settings.insert(settings.end(), rule.price.begin(), rule.price.end());
  return settings;
}

std::vector<int32_t> PipelineRules::KeyOf(const PipelineRule& rule) {
  PipelineRule alike = rule;
  alike.group_order = PipelineRule::GroupOrder::kAsGiven;
  if (rule.rhythm != PipelineRule::Rhythm::kLag) alike.lag = 0;
  if (rule.rhythm != PipelineRule::Rhythm::kPaced) alike.stretch = 0;
  if (!HasPrice(rule)) alike.holds_back = false;
  std::vector<int32_t> key = ToSettings(alike);
  key.insert(key.end(), rule.groups.begin(), rule.groups.end());
  return key;
}

std::optional<PipelineRule> PipelineRules::FromSettings(
    const std::vector<int32_t>& settings) const {
  constexpr size_t kNumbers = 12;
  if (settings.size() != kNumbers + graph_.ranks) return std::nullopt;
  const auto within = [&settings](size_t i, int32_t most) {
    return settings[i] >= 0 && settings[i] <= most;
  };
  constexpr int32_t kMost = 1 << 20;
  for (size_t i = 0; i < settings.size(); ++i) {
    if (!within(i, kMost)) return std::nullopt;
  }
  if (!within(0, static_cast<int32_t>(PipelineRule::GroupOrder::kSteepHill)) ||
      !within(1, static_cast<int32_t>(PipelineRule::Rhythm::kZeroBubbleV)) ||
      !within(3, kMostStretch) || !within(6, kPatient) ||
      !within(4,
              static_cast<int32_t>(PipelineRule::SweepOrder::kShallowFirst))) {
    return std::nullopt;
  }
  PipelineRule rule;
  rule.group_order = static_cast<PipelineRule::GroupOrder>(settings[0]);
  rule.groups = Groups(rule.group_order);
  rule.rhythm = static_cast<PipelineRule::Rhythm>(settings[1]);
  rule.lag = settings[2];
  rule.stretch = settings[3];
  rule.sweep_order = static_cast<PipelineRule::SweepOrder>(settings[4]);
  rule.by_hold = settings[5] != 0;
  rule.patience = settings[6];
  rule.split_groups = settings[7];
  rule.reserve = settings[8];
  rule.open = settings[9];
  rule.holds_back = settings[10] != 0;
  rule.twice = settings[11] != 0;
  if (rule.rhythm == PipelineRule::Rhythm::kZeroBubbleV && !is_v_) {
    return std::nullopt;
  }
  for (size_t i = kNumbers; i < settings.size(); ++i) {
    rule.price.push_back(
        static_cast<uint8_t>(std::min<int32_t>(settings[i], prices() - 1)));
  }
  return rule;
}

std::vector<PipelineRule> PipelineRules::Variations(const PipelineRule& rule,
                                                    Part part) const {
  std::vector<PipelineRule> variations;
  PipelineRule other = rule;
  const auto take = [&] {
    variations.push_back(other);
    other = rule;
  };
  switch (part) {
    case Part::kRhythm:
      for (const int lag : {graph_.ranks / 2, graph_.ranks,
                            3 * graph_.ranks / 2, 2 * graph_.ranks}) {
        if (rule.rhythm == PipelineRule::Rhythm::kLag && rule.lag == lag) {
          continue;
        }
        other.rhythm = PipelineRule::Rhythm::kLag;
        other.lag = lag;
        take();
      }
      for (const int stretch : kStretches) {
        if (rule.rhythm == PipelineRule::Rhythm::kPaced &&
            rule.stretch == stretch) {
          continue;
        }
        other.rhythm = PipelineRule::Rhythm::kPaced;
        other.stretch = stretch;
        take();
      }
      for (const auto rhythm : {PipelineRule::Rhythm::kBackwardFirst,
                                PipelineRule::Rhythm::kForwardFirst}) {
        if (rule.rhythm == rhythm) continue;
        other.rhythm = rhythm;
        take();
      }
      break;
    case Part::kOpen:
      for (const int open : kOpen) {
        if (open == rule.open || open > 4 * groups()) continue;
        other.open = open;
        take();
      }
      break;
    case Part::kPrice:
      for (int price = 0; price < prices() && prices() > 1; ++price) {
        if (rule.price[0] == price) continue;
        // Everywhere in strides, near the present one by one.
        if (price % kPriceStride != 0 &&
            std::abs(price - rule.price[0]) > kPriceStride / 2 + 1) {
          continue;
        }
        other.price.assign(graph_.ranks, static_cast<uint8_t>(price));
        take();
      }
      if (prices() > 1) {
        other.by_hold = !rule.by_hold;
        take();
      }
      break;
    case Part::kReserve:
      for (const int reserve : kReserves) {
        if (!can_fuse_ || reserve == rule.reserve) continue;
        other.reserve = reserve;
        take();
      }
      break;
    case Part::kSplit:
      for (const int split :
           {0, graph_.ranks / 2, graph_.ranks, 2 * graph_.ranks, groups()}) {
        if (!can_fuse_ || split == rule.split_groups || split > groups()) {
          continue;
        }
        other.split_groups = split;
        take();
      }
      break;
    case Part::kPatience:
      for (const int patience : {0, kPatient / 2, kPatient}) {
        if (rule.patience == patience) continue;
        other.patience = patience;
        take();
      }
      for (const auto order : {PipelineRule::SweepOrder::kAsGiven,
                               PipelineRule::SweepOrder::kDeepFirst,
                               PipelineRule::SweepOrder::kShallowFirst}) {
        if (rule.sweep_order == order) continue;
        other.sweep_order = order;
        take();
      }
      break;
  }
  for (PipelineRule& variation : variations) variation.holds_back = true;
  return variations;
}

int PipelineRules::PlaceOfLargest(const std::vector<int32_t>& order) const {
  const auto largest = std::max_element(
      order.begin(), order.end(), [this](int32_t a, int32_t b) {
        return group_work_ns_[a] < group_work_ns_[b];
      });
  return static_cast<int>(largest - order.begin());
}

void PipelineRules::ChangeSides(int place, std::vector<int32_t>& order) const {
  const auto largest = order.begin() + PlaceOfLargest(order);
  const auto group = order.begin() + place;
  const int64_t work_ns = group_work_ns_[*group];
  if (group < largest) {
    const auto next = std::find_if(largest, order.end(), [&](int32_t other) {
      return group_work_ns_[other] < work_ns;
    });
    std::rotate(group, group + 1, next);
  } else {
    const auto next = std::find_if(order.begin(), largest, [&](int32_t other) {
      return group_work_ns_[other] > work_ns;
    });
    std::rotate(next, group, group + 1);
  }
}

// Pipelines fill and drain well in orders that rise to the largest group and
// fall behind it. Most changes of order are from one of these to another: a
// group moves to the other side of the largest. Numbers change by little, those
// of memory most often, or to any of their values.
PipelineRule PipelineRules::Mutate(const PipelineRule& rule,
                                   std::mt19937_64& random) const {
  PipelineRule other = rule;
  const auto below = [&random](int bound) {
    return static_cast<int>(random() % static_cast<uint64_t>(bound));
  };
  // Up or down by one or two.
  const auto step = [&below] {
    const int by = 1 + below(2);
    return below(2) == 0 ? -by : by;
  };
  other.holds_back = other.twice = true;
  const int m = groups();
  const bool lags = rule.rhythm == PipelineRule::Rhythm::kLag;
  const bool paced = rule.rhythm == PipelineRule::Rhythm::kPaced;
  const int side_chance = m > 1 ? 6 : 0;
  const int swap_chance = m > 1 ? 1 : 0;
  const int price_chance = HasPrice(rule) ? 4 : 0;
  const int open_chance = rule.open > 0 ? 4 : 0;
  const int pace_chance = lags || paced ? 2 : 0;
  const int variation_chance = 6;
  int pick = below(side_chance + swap_chance + price_chance + open_chance +
                   pace_chance + variation_chance);
  if ((pick -= side_chance) < 0) {
    // Any but the largest.
    const int place = below(m - 1);
    const bool behind = place >= PlaceOfLargest(other.groups);
    ChangeSides(place + (behind ? 1 : 0), other.groups);
  } else if ((pick -= swap_chance) < 0) {
    std::swap(other.groups[below(m)], other.groups[below(m)]);
  } else if ((pick -= price_chance) < 0) {
    // On all ranks, or on one.
    const int by = step();
    const bool all = below(2) == 0;
    const int one = below(graph_.ranks);
    for (int r = 0; r < graph_.ranks; ++r) {
      if (!all && r != one) continue;
      other.price[r] =
          static_cast<uint8_t>(std::clamp(rule.price[r] + by, 0, prices() - 1));
    }
  } else if ((pick -= open_chance) < 0) {
    other.open = std::max(1, rule.open + step());
  } else if ((pick -= pace_chance) < 0) {
    if (lags) {
      other.lag = std::max(0, rule.lag + step());
    } else {
      other.stretch = std::clamp(rule.stretch + step(), 0, kMostStretch);
    }
  } else {
    const std::vector<PipelineRule> variations =
        Variations(other, kParts[below(std::size(kParts))]);
    if (!variations.empty()) {
      other = variations[below(static_cast<int>(variations.size()))];
    }
  }
  return other;
}

std::vector<int32_t> PipelineRules::GroupOrderOf(
    const Schedule& schedule) const {
  std::vector<double> first(groups(), 2.0);
  for (const auto& row : schedule.ranks) {
    for (size_t i = 0; i < row.size(); ++i) {
      const int s = row[i].sweep;
      if (s < 0 || s >= graph_.sweeps) continue;
      double& at = first[group_of_sweep_[s]];
      at = std::min(at,
                    static_cast<double>(i) / static_cast<double>(row.size()));
    }
  }
  std::vector<int32_t> order(groups());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&first](int a, int b) { return first[a] < first[b]; });
  return order;
}

void PipelineRules::BuildZeroBubbleV(const std::vector<int32_t>& place,
                                     ListRule& list) const {
  const size_t m = static_cast<size_t>(groups());
  list.strict = list.patience == 0;
  for (int p = 0; p < graph_.pairs; ++p) {
    const int s = graph_.pair_sweep[p];
    const size_t at =
        (static_cast<size_t>(graph_.pair_rank[p]) * 2 + depth_[s]) * m +
        place[group_of_sweep_[s]];
    for (int kind = 0; kind < 3; ++kind) {
      list.key[3 * p + kind] = v_place_[at * 3 + kind];
    }
  }
}

double PipelineRules::PriceOf(const PipelineRule& rule, int pair) const {
  const PriceLadder& ladder = ladders_[rule.by_hold];
  const auto last = static_cast<uint8_t>(ladder.prices.size() - 1);
  return ladder.prices[std::min(
      last, std::max(rule.price[graph_.pair_rank[pair]], ladder.least[pair]))];
}

bool PipelineRules::MemoryIsScarce(const PipelineRule& rule) const {
  const int prices = static_cast<int>(ladders_[rule.by_hold].prices.size());
  const int most = std::min<int>(
      prices - 1, *std::max_element(rule.price.begin(), rule.price.end()));
  return is_scarce_ || (rule.holds_back && most > prices / kScarceShare);
}

void PipelineRules::HoldBack(absl::Span<const int64_t> start_ns,
                             ListRule& list) const {
  list.not_before_ns.resize(graph_.pairs);
  for (int p = 0; p < graph_.pairs; ++p) {
    list.not_before_ns[p] = start_ns[3 * p + kForwardTask] - ahead_ns_;
  }
}

void PipelineRules::Reprice(const PipelineRule& rule,
                            absl::Span<const int64_t> hold_ns,
                            Ways& ways) const {
  const PriceLadder& ladder = ladders_[rule.by_hold];
  double whole_ns = 0, whole_weight = 0;
  for (int p = 0; p < graph_.pairs; ++p) {
    if (!graph_.has_backward(p)) continue;
    whole_ns += static_cast<double>(hold_ns[p]);
    whole_weight += ladder.weights[p];
  }
  if (whole_ns == 0) return;
  for (int p = 0; p < graph_.pairs; ++p) {
    if (!graph_.has_backward(p)) continue;
    const double held =
        static_cast<double>(hold_ns[p]) * whole_weight / whole_ns;
    const double weight =
        (1 - kHeldShare) * ladder.weights[p] + kHeldShare * held;
    // Its component fits alone, however short it was held.
    const double least = ladder.prices[ladder.least[p]] * ladder.weights[p];
    const int choice =
        memory_.At(p, std::max(least, PriceOf(rule, p) * weight)).choice;
    if (ways.fused[p] == Ways::kFused && graph_.mode[p] == PairMode::kSplit &&
        !graph_.choices_of(p)[choice].has_backward()) {
      continue;
    }
    ways.choice[p] = choice;
  }
}

void PipelineRules::BuildAgain(const PipelineRule& rule, const TaskOrder& order,
                               OrderTimes& times, ListRule& list,
                               Ways& ways) const {
  list.not_before_ns.clear();
  list.alternate = list.strict = false;
  list.patience = kPatienceAgain;
  list.weight_reserve_ns = 0;
  list.open_work_ns = std::numeric_limits<int64_t>::max();
  times.Latest(order, list.key);
  ways = order.ways;
  if (!MemoryIsScarce(rule)) return;
  HoldBack(list.key, list);
  std::vector<int64_t> hold_ns;
  times.Holds(hold_ns);
  Reprice(rule, hold_ns, ways);
}

void PipelineRules::Build(const PipelineRule& rule, ListRule& list,
                          Ways& ways) const {
  const int m = groups();
  std::vector<int32_t> place(m);
  for (int i = 0; i < m; ++i) place[rule.groups[i]] = i;
  list.key.resize(3 * static_cast<size_t>(graph_.pairs));
  list.not_before_ns.clear();
  list.patience = rule.patience;
  list.strict = false;
  list.open_work_ns =
      rule.open == 0 || rule.open >= 4 * groups()
          ? std::numeric_limits<int64_t>::max()
          : std::max<int64_t>(1, mean_component_work_ns_ / 4 * rule.open);
  const bool never_fuse = rule.reserve >= kMostReserve;
  list.weight_reserve_ns =
      never_fuse ? 0
                 : std::min(mean_weight_grad_ns_, kFarAhead / kMostReserve) *
                       rule.reserve;
  const PriceLadder& ladder = ladders_[rule.by_hold];
  ways.choice.resize(graph_.pairs);
  ways.fused.resize(graph_.pairs);
  for (int p = 0; p < graph_.pairs; ++p) {
    const int s = graph_.pair_sweep[p];
    ways.choice[p] = memory_.At(p, PriceOf(rule, p) * ladder.weights[p]).choice;
    const int64_t i = place[group_of_sweep_[s]];
    ways.fused[p] = graph_.mode[p] != PairMode::kSplit || never_fuse ||
                            i >= m - rule.split_groups
                        ? Ways::kApart
                        : Ways::kEither;
  }
  if (rule.rhythm == PipelineRule::Rhythm::kZeroBubbleV) {
    BuildZeroBubbleV(place, list);
    return;
  }
  // Due times are the keys of kPaced, and what forwards are held back by.
  const bool paced = rule.rhythm == PipelineRule::Rhythm::kPaced;
  const bool scarce = MemoryIsScarce(rule);
  if (paced || scarce) SetDueTimes(rule, list.key);
  if (scarce) HoldBack(list.key, list);
  if (paced) {
    for (int p = 0; p < graph_.pairs; ++p) {
      list.key[3 * p + kWeightTask] =
          kFarAhead + place[group_of_sweep_[graph_.pair_sweep[p]]];
    }
    return;
  }
  for (int p = 0; p < graph_.pairs; ++p) {
    const int s = graph_.pair_sweep[p];
    const int64_t base = place[group_of_sweep_[s]] * kGroupStride;
    int64_t forward = base + s;
    if (rule.sweep_order == PipelineRule::SweepOrder::kDeepFirst) {
      forward = base + kGroupStride / 2 - depth_[s];
    } else if (rule.sweep_order == PipelineRule::SweepOrder::kShallowFirst) {
      forward = base + depth_[s];
    }
    int64_t gradient = 0;
    switch (rule.rhythm) {
      case PipelineRule::Rhythm::kBackwardFirst:
        gradient = base - kFarAhead;
        break;
      case PipelineRule::Rhythm::kLag:
        gradient = base + rule.lag * kGroupStride - 1;
        break;
      default:
        gradient = base + kFarAhead;
        break;
    }
    list.key[3 * p + kForwardTask] = forward;
    list.key[3 * p + kGradientTask] = gradient;
    list.key[3 * p + kWeightTask] = base + 2 * kFarAhead;
  }
}

}  // namespace pipeweaver::search
