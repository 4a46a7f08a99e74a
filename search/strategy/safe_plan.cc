// Feasibility within memory, component by component; see safe_plan.h.

#include "search/strategy/safe_plan.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <queue>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "search/problem/problem_graph.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

// Work that the search for one component may spend, in pair steps.
constexpr int64_t kMostWork = 50'000'000;

// Components times ranks: strategies keep some 100 bytes for each.
constexpr int64_t kMostCells = int64_t{1} << 24;

// A way to run a pair: choice and fused or not, with what it holds.
struct Way {
  int32_t choice = 0;
  bool fused = false;
  int64_t activation = 0;
  int64_t backward = 0;  // BackwardStepBytes
};

// The ways that no other way matches in both activation and backward bytes,
// least activation first.
std::vector<Way> ParetoWays(const ProblemGraph& graph, int pair) {
  std::vector<Way> ways;
  const auto choices = graph.choices_of(pair);
  for (int c = 0; c < choices.size(); ++c) {
    for (const bool fused : {false, true}) {
      if (fused && (graph.mode[pair] != PairMode::kSplit ||
                    !choices[c].has_backward())) {
        continue;
      }
      ways.push_back({c, fused, choices[c].activation_bytes,
                      BackwardStepBytes(choices[c], graph.mode[pair], fused)});
    }
  }
  std::stable_sort(ways.begin(), ways.end(), [](const Way& a, const Way& b) {
    return a.activation != b.activation ? a.activation < b.activation
                                        : a.backward < b.backward;
  });
  std::vector<Way> pareto;
  for (const Way& way : ways) {
    if (pareto.empty() || way.backward < pareto.back().backward) {
      pareto.push_back(way);
    }
  }
  return pareto;
}

// ParetoWays of many pairs; alike ones, which share their choices, are computed
// once.
class WaysOfPairs {
 public:
  explicit WaysOfPairs(const ProblemGraph& graph) : graph_(graph) {}

  const std::vector<Way>& Of(int pair) {
    const auto [it, inserted] = ways_.try_emplace(
        std::pair(graph_.choice_begin[pair], graph_.mode[pair]));
    if (inserted) it->second = ParetoWays(graph_, pair);
    return it->second;
  }

 private:
  const ProblemGraph& graph_;
  absl::flat_hash_map<std::pair<int32_t, PairMode>, std::vector<Way>> ways_;
};

// Where a component does not fit.
struct Shortage {
  int rank = -1;
  int64_t bytes = 0;
};

class ComponentSolver {
 public:
  // `pairs`: those of `sweeps`, producers first. `local` has an entry for every
  // pair of the problem: -1 for all but pairs of sweeps with a backward.
  ComponentSolver(const ProblemGraph& graph, WaysOfPairs& ways,
                  std::vector<int32_t> sweeps, std::vector<int32_t> pairs,
                  std::vector<int32_t>& local)
      : graph_(graph),
        sweeps_(std::move(sweeps)),
        pairs_(std::move(pairs)),
        local_(local) {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      local_[pairs_[i]] = static_cast<int32_t>(i);
      ways_.push_back(ways.Of(pairs_[i]));
    }
    int sinks = 0;
    for (const int s : sweeps_) {
      const int last = graph.sweep_first_pair[s + 1] - 1;
      if (graph.consumers_of(last).size() == 0) ++sinks;
    }
    single_sink_ = sinks == 1;
    picked_.assign(pairs_.size(), nullptr);
    held_.assign(graph.ranks, 0);
  }

  // True when a plan was found, in the fields below.
  bool Solve() {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      const int64_t limit = Limit(i);
      int64_t least = std::numeric_limits<int64_t>::max();
      for (const Way& way : ways_[i]) {
        least = std::min(least, std::max(way.activation, way.backward));
      }
      if (least > limit) return Fail(graph_.pair_rank[pairs_[i]], least);
      std::vector<Way>& ways = ways_[i];
      ways.erase(std::remove_if(ways.begin(), ways.end(),
                                [limit](const Way& way) {
                                  return std::max(way.activation,
                                                  way.backward) > limit;
                                }),
                 ways.end());
    }
    if (PickInOrder() && ForwardsFirst()) return true;
    if (single_sink_) return BranchOnChoices(0) && ForwardsFirst();
    forwards_first_ = false;
    return StepGreedily() || SearchSteps();
  }

  SafeComponent component() const { return {sweeps_, steps_, forwards_first_}; }
  void WriteWays(SafePlan& plan) const {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      plan.choice[pairs_[i]] = picked_[i]->choice;
      plan.fused[pairs_[i]] = picked_[i]->fused ? 1 : 0;
    }
  }
  const Shortage& shortage() const { return shortage_; }
  bool gave_up() const { return work_ > kMostWork; }

 private:
  int64_t Limit(size_t i) const {
    return graph_.limit_bytes[graph_.pair_rank[pairs_[i]]];
  }
  int64_t& Held(size_t i) { return held_[graph_.pair_rank[pairs_[i]]]; }

  bool Fail(int rank, int64_t bytes) {
    if (shortage_.rank < 0) shortage_ = {rank, bytes};
    return false;
  }

  // Picks ways for backwards in reverse topological order, all F first: from
  // the last backward on, the least activation whose backward still fits above
  // what stays held. Exact for that order.
  bool PickInOrder() {
    std::fill(held_.begin(), held_.end(), 0);
    for (size_t i = 0; i < pairs_.size(); ++i) {
      picked_[i] = nullptr;
      for (const Way& way : ways_[i]) {
        if (Held(i) + std::max(way.activation, way.backward) <= Limit(i)) {
          picked_[i] = &way;
          break;
        }
      }
      if (picked_[i] == nullptr) {
        const Way& lean = ways_[i].front();
        return Fail(graph_.pair_rank[pairs_[i]],
                    Held(i) + std::max(lean.activation, lean.backward));
      }
      Held(i) += picked_[i]->activation;
    }
    return true;
  }

  // Runs all F, then whatever backward is ready and fits. Pairs without a
  // picked way count with the least of their bytes, each by itself. On success
  // and with `record`, steps_ is the order.
  bool RunForwardsFirst(bool record) {
    work_ += static_cast<int64_t>(pairs_.size());
    const auto activation = [&](size_t i) {
      return picked_[i] != nullptr ? picked_[i]->activation
                                   : ways_[i].front().activation;
    };
    const auto backward = [&](size_t i) {
      return picked_[i] != nullptr ? picked_[i]->backward
                                   : ways_[i].back().backward;
    };
    std::fill(held_.begin(), held_.end(), 0);
    for (size_t i = 0; i < pairs_.size(); ++i) Held(i) += activation(i);
    for (int r = 0; r < graph_.ranks; ++r) {
      if (held_[r] > graph_.limit_bytes[r]) return Fail(r, held_[r]);
    }
    std::vector<int> waits(pairs_.size());
    std::vector<std::vector<int>> ready(graph_.ranks);
    std::vector<int> ranks_to_try;
    const auto make_ready = [&](int i) {
      const int r = graph_.pair_rank[pairs_[i]];
      ready[r].push_back(i);
      ranks_to_try.push_back(r);
    };
    for (int i = static_cast<int>(pairs_.size()) - 1; i >= 0; --i) {
      waits[i] = graph_.consumers_of(pairs_[i]).size();
      if (waits[i] == 0) make_ready(i);
    }
    std::vector<int> order;
    while (!ranks_to_try.empty()) {
      const int r = ranks_to_try.back();
      ranks_to_try.pop_back();
      for (size_t at = 0; at < ready[r].size();) {
        const int i = ready[r][at];
        if (held_[r] - activation(i) + backward(i) > graph_.limit_bytes[r]) {
          ++at;
          continue;
        }
        held_[r] -= activation(i);
        order.push_back(i);
        ready[r].erase(ready[r].begin() + static_cast<int64_t>(at));
        for (const GraphEdge& edge : graph_.producers_of(pairs_[i])) {
          const int producer = local_[edge.pair];
          if (producer >= 0 && --waits[producer] == 0) make_ready(producer);
        }
        at = 0;
      }
    }
    if (order.size() < pairs_.size()) {
      for (int r = 0; r < graph_.ranks; ++r) {
        if (!ready[r].empty()) {
          const int i = ready[r].front();
          return Fail(r, held_[r] - activation(i) + backward(i));
        }
      }
    }
    if (record) {
      steps_.clear();
      for (const int p : pairs_) steps_.push_back({p, false});
      for (const int i : order) steps_.push_back({pairs_[i], true});
    }
    return true;
  }

  bool ForwardsFirst() { return RunForwardsFirst(/*record=*/true); }

  // Branch and bound over the choices of pairs i.., for a single sink.
  bool BranchOnChoices(size_t i) {
    if (i == 0) std::fill(picked_.begin(), picked_.end(), nullptr);
    if (work_ > kMostWork || !RunForwardsFirst(/*record=*/false)) return false;
    while (i < pairs_.size() && ways_[i].size() == 1) {
      picked_[i] = &ways_[i].front();
      ++i;
    }
    if (i == pairs_.size()) return true;
    for (const Way& way : ways_[i]) {
      picked_[i] = &way;
      if (BranchOnChoices(i + 1)) return true;
      for (size_t j = i; j < pairs_.size(); ++j) picked_[j] = nullptr;
      if (work_ > kMostWork) return false;
    }
    return false;
  }

  // The first descent of SearchSteps, without a way back, in time that grows
  // little faster than the component: every pair run its leanest way, backwards
  // as soon as they fit, else the last F that is ready and fits.
  bool StepGreedily() {
    const auto n = static_cast<int>(pairs_.size());
    steps_.clear();
    std::fill(held_.begin(), held_.end(), 0);
    std::vector<int> waits_forward(n, 0), waits_backward(n, 1);
    std::priority_queue<int> forwards;
    // [rank]: ready, and found not to fit when the rank last held less.
    std::vector<std::vector<int>> stalled_forwards(graph_.ranks);
    std::vector<std::vector<int>> backwards(graph_.ranks);
    std::vector<int> ranks_to_try;
    const auto backward_waits_less = [&](int i) {
      if (--waits_backward[i] > 0) return;
      const int r = graph_.pair_rank[pairs_[i]];
      backwards[r].push_back(i);
      ranks_to_try.push_back(r);
    };
    for (int i = 0; i < n; ++i) {
      picked_[i] = &ways_[i].front();
      waits_backward[i] += graph_.consumers_of(pairs_[i]).size();
      for (const GraphEdge& edge : graph_.producers_of(pairs_[i])) {
        if (local_[edge.pair] >= 0) ++waits_forward[i];
      }
      if (waits_forward[i] == 0) forwards.push(i);
    }
    while (true) {
      while (!ranks_to_try.empty()) {
        const int r = ranks_to_try.back();
        ranks_to_try.pop_back();
        bool moved = false;
        for (size_t at = 0; at < backwards[r].size();) {
          const int i = backwards[r][at];
          const int64_t after = held_[r] - picked_[i]->activation;
          if (after + picked_[i]->backward > Limit(i)) {
            ++at;
            continue;
          }
          held_[r] = after;
          moved = true;
          backwards[r][at] = backwards[r].back();
          backwards[r].pop_back();
          steps_.push_back({pairs_[i], true});
          for (const GraphEdge& edge : graph_.producers_of(pairs_[i])) {
            if (local_[edge.pair] >= 0) backward_waits_less(local_[edge.pair]);
          }
        }
        if (!moved) continue;
        ranks_to_try.push_back(r);
        for (const int i : stalled_forwards[r]) forwards.push(i);
        stalled_forwards[r].clear();
      }
      if (forwards.empty()) break;
      const int i = forwards.top();
      forwards.pop();
      if (Held(i) + picked_[i]->activation > Limit(i)) {
        stalled_forwards[graph_.pair_rank[pairs_[i]]].push_back(i);
        continue;
      }
      Held(i) += picked_[i]->activation;
      steps_.push_back({pairs_[i], false});
      for (const GraphEdge& edge : graph_.consumers_of(pairs_[i])) {
        if (--waits_forward[local_[edge.pair]] == 0) {
          forwards.push(local_[edge.pair]);
        }
      }
      backward_waits_less(i);
    }
    return steps_.size() == 2 * pairs_.size();
  }

  // Depth-first search over the order of F steps and their choices.
  bool SearchSteps() {
    steps_.clear();
    std::fill(held_.begin(), held_.end(), 0);
    std::fill(picked_.begin(), picked_.end(), nullptr);
    state_.assign(pairs_.size(), 0);
    return Step();
  }

  bool Ready(size_t i) const {
    for (const GraphEdge& edge : graph_.producers_of(pairs_[i])) {
      const int producer = local_[edge.pair];
      if (producer >= 0 && state_[producer] == 0) return false;
    }
    return true;
  }
  bool BackwardReady(size_t i) const {
    for (const GraphEdge& edge : graph_.consumers_of(pairs_[i])) {
      if (state_[local_[edge.pair]] != kDone) return false;
    }
    return true;
  }

  std::string StateKey() const {
    return std::string(reinterpret_cast<const char*>(state_.data()),
                       state_.size() * sizeof(state_[0]));
  }

  bool Step() {
    work_ += static_cast<int64_t>(pairs_.size());
    const size_t steps_before = steps_.size();
    // Backwards that fit run at once.
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t i = pairs_.size(); i-- > 0;) {
        if (state_[i] == 0 || state_[i] == kDone || !BackwardReady(i)) continue;
        const int64_t after = Held(i) - picked_[i]->activation;
        if (after + picked_[i]->backward > Limit(i)) continue;
        Held(i) = after;
        undo_.push_back({i, state_[i]});
        state_[i] = kDone;
        steps_.push_back({pairs_[i], true});
        moved = true;
      }
    }
    if (steps_.size() == 2 * pairs_.size()) return true;
    if (work_ <= kMostWork && seen_.insert(StateKey()).second) {
      // Later sweeps first: they lead to backwards soonest.
      // Once the work is spent, no branch that is left is tried.
      for (size_t i = pairs_.size(); i-- > 0 && work_ <= kMostWork;) {
        if (state_[i] != 0 || !Ready(i)) continue;
        for (size_t w = 0; w < ways_[i].size() && work_ <= kMostWork; ++w) {
          const Way& way = ways_[i][w];
          if (Held(i) + way.activation > Limit(i)) {
            Fail(graph_.pair_rank[pairs_[i]], Held(i) + way.activation);
            continue;
          }
          Held(i) += way.activation;
          picked_[i] = &way;
          state_[i] = static_cast<int32_t>(w + 1);
          steps_.push_back({pairs_[i], false});
          if (Step()) return true;
          steps_.pop_back();
          state_[i] = 0;
          Held(i) -= way.activation;
        }
        picked_[i] = nullptr;
      }
    }
    UndoTo(steps_before);
    return false;
  }

  void UndoTo(size_t steps_mark) {
    while (steps_.size() > steps_mark) {
      PW_CHECK(!undo_.empty());
      const auto [i, state] = undo_.back();
      undo_.pop_back();
      state_[i] = state;
      Held(i) += picked_[i]->activation;
      steps_.pop_back();
    }
  }

  static constexpr int32_t kDone = -1;

  const ProblemGraph& graph_;
  std::vector<int32_t> sweeps_;
  std::vector<int32_t> pairs_;   // of the component, producers first
  std::vector<int32_t>& local_;  // index in pairs_, or -1
  std::vector<std::vector<Way>> ways_;
  std::vector<const Way*> picked_;
  std::vector<int64_t> held_;
  std::vector<SafeStep> steps_;
  bool single_sink_ = true;
  bool forwards_first_ = true;
  Shortage shortage_;
  int64_t work_ = 0;
  // SearchSteps: 0 before F, 1 + way after it, kDone after the backward.
  std::vector<int32_t> state_;
  std::vector<std::pair<size_t, int32_t>> undo_;
  absl::flat_hash_set<std::string> seen_;
};

std::vector<std::vector<int32_t>> Components(const ProblemGraph& graph) {
  std::vector<int32_t> parent(graph.sweeps);
  for (int s = 0; s < graph.sweeps; ++s) parent[s] = s;
  const auto root = [&](int s) {
    while (parent[s] != s) s = parent[s] = parent[parent[s]];
    return s;
  };
  const auto trains = [&](int s) {
    return graph.has_backward(graph.sweep_first_pair[s]);
  };
  for (int s = 0; s < graph.sweeps; ++s) {
    for (const GraphEdge& edge :
         graph.producers_of(graph.sweep_first_pair[s])) {
      const int before = graph.pair_sweep[edge.pair];
      if (!trains(s) || !trains(before)) continue;
      const int a = root(s), b = root(before);
      parent[std::max(a, b)] = std::min(a, b);
    }
  }
  std::vector<std::vector<int32_t>> components;
  std::vector<int32_t> index(graph.sweeps, -1);
  for (int s = 0; s < graph.sweeps; ++s) {
    if (!trains(s)) continue;
    const int r = root(s);
    if (index[r] < 0) {
      index[r] = static_cast<int32_t>(components.size());
      components.emplace_back();
    }
    components[index[r]].push_back(s);
  }
  return components;
}

}  // namespace

int64_t BackwardStepBytes(const GraphChoice& choice, PairMode mode,
                          bool fused) {
  if (mode == PairMode::kSplit && !fused) {
    return std::max(choice.input_grad_bytes, choice.weight_grad_bytes);
  }
  return choice.backward_bytes;
}

absl::StatusOr<SafePlan> FindSafePlan(const ProblemGraph& graph) {
  SafePlan plan;
  plan.component_of_sweep.assign(graph.sweeps, -1);
  plan.choice.assign(graph.pairs, 0);
  plan.fused.assign(graph.pairs, 0);
  const auto none_exists = [&](int rank, int64_t bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no schedule exists: rank ", rank, " would hold ", bytes,
                     " bytes, its limit is ", graph.limit_bytes[rank]));
  };
  for (int p = 0; p < graph.pairs; ++p) {
    if (graph.has_backward(p)) continue;
    const auto choices = graph.choices_of(p);
    int best = 0;
    for (int c = 1; c < choices.size(); ++c) {
      if (choices[c].activation_bytes < choices[best].activation_bytes) {
        best = c;
      }
    }
    plan.choice[p] = best;
    const int r = graph.pair_rank[p];
    if (choices[best].activation_bytes > graph.limit_bytes[r]) {
      return none_exists(r, choices[best].activation_bytes);
    }
  }
  std::vector<std::vector<int32_t>> components = Components(graph);
  if (static_cast<int64_t>(components.size()) * graph.ranks > kMostCells) {
    return absl::ResourceExhaustedError(
        absl::StrCat("segments, ranks: ", components.size(),
                     " groups of segments that hang together, times ",
                     graph.ranks, " ranks: must be at most ", kMostCells));
  }
  for (size_t c = 0; c < components.size(); ++c) {
    for (const int s : components[c]) {
      plan.component_of_sweep[s] = static_cast<int32_t>(c);
    }
  }
  std::vector<std::vector<int32_t>> pairs(components.size());
  for (const int p : graph.topological) {
    const int c = plan.component_of_sweep[graph.pair_sweep[p]];
    if (c >= 0) pairs[c].push_back(p);
  }
  std::vector<int32_t> local(graph.pairs, -1);
  WaysOfPairs ways(graph);
  for (size_t c = 0; c < components.size(); ++c) {
    ComponentSolver solver(graph, ways, std::move(components[c]),
                           std::move(pairs[c]), local);
    if (!solver.Solve()) {
      const Shortage& at = solver.shortage();
      if (!solver.gave_up()) return none_exists(at.rank, at.bytes);
      return absl::ResourceExhaustedError(
          absl::StrCat("no schedule was found, one may exist: rank ", at.rank,
                       " comes to ", at.bytes, " bytes in the orders tried, ",
                       "its limit is ", graph.limit_bytes[at.rank]));
    }
    plan.components.push_back(solver.component());
    solver.WriteWays(plan);
  }
  return plan;
}

}  // namespace pipeweaver::search
