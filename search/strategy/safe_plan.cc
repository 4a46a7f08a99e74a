// Feasibility within memory, component by component; see safe_plan.h.

#include "search/strategy/safe_plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <limits>
#include <optional>
#include <queue>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "search/problem/disjoint_sets.h"
#include "search/problem/field_error.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/strategy.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

// Work that the searches for all components together may spend once the
// deadline has passed, in pair steps.
constexpr int64_t kMostLateWork = 5'000'000;
// Of it, what one component may spend to prove that a rank cannot do.
constexpr int64_t kMostProofWork = 5'000'000;
constexpr int64_t kStepsPerClockCheck = 1 << 16;
// What an exhaustive search may spend before descents are tried.
constexpr int64_t kFirstSearchWork = 1'000'000;
// Random descents before the rest of it.
constexpr int kDescents = 400;
// How far off a place may be in them: 1, 2, 4 ... pairs.
constexpr int kSpreads = 10;

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

// Where a component does not fit: in the first order tried, or, where
// `every_order`, in any.
struct Shortage {
  int rank = -1;
  int64_t bytes = 0;
  bool every_order = false;
};

// The work that is left for searches.
class WorkLeft {
 public:
  WorkLeft(const SearchBudget& budget, int64_t most_work)
      : budget_(budget), left_(most_work) {}

  void Spend(int64_t pair_steps) {
    left_ -= pair_steps;
    until_check_ -= pair_steps;
    if (until_check_ <= 0) CheckBudget();
  }
  int64_t left() const { return left_; }
  bool over() const { return left_ < 0; }

 private:
  void CheckBudget() {
    until_check_ = kStepsPerClockCheck;
    if (budget_.cancelled != nullptr &&
        budget_.cancelled->load(std::memory_order_relaxed)) {
      left_ = -1;
    } else if (!late_ && budget_.deadline.has_value() &&
               std::chrono::steady_clock::now() >= *budget_.deadline) {
      late_ = true;
      left_ = std::min(left_, kMostLateWork);
    }
  }

  const SearchBudget& budget_;
  int64_t left_;
  int64_t until_check_ = 0;
  bool late_ = false;
};

class ComponentSolver {
 public:
  // `pairs`: those of `sweeps`, producers first. `local` has an entry for every
  // pair of the problem: -1 for all but pairs of sweeps with a backward.
  ComponentSolver(const ProblemGraph& graph, WaysOfPairs& ways,
                  std::vector<int32_t> sweeps, std::vector<int32_t> pairs,
                  std::vector<int32_t>& local, WorkLeft& work)
      : graph_(graph),
        work_(work),
        sweeps_(std::move(sweeps)),
        pairs_(std::move(pairs)),
        local_(local) {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      local_[pairs_[i]] = static_cast<int32_t>(i);
      ways_.push_back(ways.Of(pairs_[i]));
      ranks_.push_back(graph.pair_rank[pairs_[i]]);
      everything_.push_back(static_cast<int32_t>(i));
    }
    std::sort(ranks_.begin(), ranks_.end());
    ranks_.erase(std::unique(ranks_.begin(), ranks_.end()), ranks_.end());
    for (const int p : pairs_) {
      rank_of_.push_back(static_cast<int32_t>(
          std::lower_bound(ranks_.begin(), ranks_.end(), graph.pair_rank[p]) -
          ranks_.begin()));
    }
    for (const int s : sweeps_) {
      const int last = graph.sweep_first_pair[s + 1] - 1;
      if (graph.consumers_of(last).size() == 0) sinks_.push_back(local_[last]);
    }
    single_sink_ = sinks_.size() == 1;
    picked_.assign(pairs_.size(), nullptr);
    held_.assign(ranks_.size(), 0);
    waits_.resize(pairs_.size());
    ready_.resize(ranks_.size());
  }

  // True when a plan was found, in the fields below.
  bool Solve() {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      const int64_t limit = Limit(i);
      int64_t least = std::numeric_limits<int64_t>::max();
      for (const Way& way : ways_[i]) {
        least = std::min(least, std::max(way.activation, way.backward));
      }
      if (least > limit) {
        shortage_ = {graph_.pair_rank[pairs_[i]], least, true};
        return false;
      }
      std::vector<Way>& ways = ways_[i];
      ways.erase(std::remove_if(ways.begin(), ways.end(),
                                [limit](const Way& way) {
                                  return std::max(way.activation,
                                                  way.backward) > limit;
                                }),
                 ways.end());
    }
    if (PickInOrder(everything_) && ForwardsFirst()) return true;
    forwards_first_ = single_sink_;
    if (!single_sink_ && StepGreedily(nullptr, 0)) return true;
    if (NoOrderFits()) return false;
    // What little work solves is solved alike whether descents would or not.
    search_until_ = work_.left() - kFirstSearchWork;
    if (SearchAll()) return true;
    if (!SearchIsOver()) return false;
    search_until_ = 0;
    std::mt19937_64 random(/*seed=*/1);
    return (single_sink_ ? TryOrders(random) : TryDescents(random)) ||
           SearchAll();
  }

  SafeComponent component() const { return {sweeps_, steps_, forwards_first_}; }
  void WriteWays(SafePlan& plan) const {
    for (size_t i = 0; i < pairs_.size(); ++i) {
      plan.choice[pairs_[i]] = picked_[i]->choice;
      plan.fused[pairs_[i]] = picked_[i]->fused ? 1 : 0;
    }
  }
  const Shortage& shortage() const { return shortage_; }

 private:
  int64_t LimitOf(int rank) const { return graph_.limit_bytes[ranks_[rank]]; }
  int64_t Limit(size_t i) const { return LimitOf(rank_of_[i]); }
  int64_t& Held(size_t i) { return held_[rank_of_[i]]; }

  bool SearchIsOver() const {
    return work_.over() || work_.left() < search_until_;
  }

  // Exhaustive unless the search is over.
  bool SearchAll() {
    return single_sink_ ? BranchOnChoices(0) && ForwardsFirst() : SearchSteps();
  }

  bool Fail(int rank, int64_t bytes) {
    if (shortage_.rank < 0) shortage_ = {ranks_[rank], bytes, false};
    return false;
  }

  // Picks ways for backwards in the reverse of `order`, which has producers
  // first, all F first: from the last backward on, the least activation whose
  // backward still fits above what stays held. Exact for that order.
  bool PickInOrder(const std::vector<int32_t>& order) {
    std::fill(held_.begin(), held_.end(), 0);
    for (const int i : order) {
      picked_[i] = nullptr;
      for (const Way& way : ways_[i]) {
        if (Held(i) + std::max(way.activation, way.backward) <= Limit(i)) {
          picked_[i] = &way;
          break;
        }
      }
      if (picked_[i] == nullptr) {
        const Way& lean = ways_[i].front();
        return Fail(rank_of_[i],
                    Held(i) + std::max(lean.activation, lean.backward));
      }
      Held(i) += picked_[i]->activation;
    }
    return true;
  }

  // PickInOrder for random orders of backwards.
  bool TryOrders(std::mt19937_64& random) {
    std::vector<std::pair<uint64_t, int32_t>> heap;
    std::vector<int32_t> order;
    std::vector<int32_t> waits(pairs_.size());
    for (int d = 0; d < kDescents && !work_.over(); ++d) {
      work_.Spend(4 * static_cast<int64_t>(pairs_.size()));
      const auto push = [&](int i) {
        heap.push_back({random(), i});
        std::push_heap(heap.begin(), heap.end());
      };
      order.clear();
      for (size_t i = 0; i < pairs_.size(); ++i) {
        waits[i] = ProducersOf(i);
        if (waits[i] == 0) push(static_cast<int>(i));
      }
      while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end());
        const int i = heap.back().second;
        heap.pop_back();
        order.push_back(i);
        for (const GraphEdge& edge : graph_.consumers_of(pairs_[i])) {
          if (--waits[local_[edge.pair]] == 0) push(local_[edge.pair]);
        }
      }
      if (PickInOrder(order) && ForwardsFirst()) return true;
    }
    return false;
  }

  // How many pairs of the component feed pair i.
  int ProducersOf(size_t i) const {
    int count = 0;
    for (const GraphEdge& edge : graph_.producers_of(pairs_[i])) {
      if (local_[edge.pair] >= 0) ++count;
    }
    return count;
  }

  // Runs all F of `members`, which with a pair have all that feed it, then
  // whatever backward is ready and fits; into `order`, backwards as they ran.
  // Pairs without a picked way count with the least of their bytes, each by
  // itself. Other ranks than `only` have no limit, unless it is negative. Where
  // that does not come to an end: the least that some rank would hold.
  std::optional<Shortage> RunMembers(const std::vector<int32_t>& members,
                                     int only, std::vector<int32_t>& order) {
    work_.Spend(static_cast<int64_t>(members.size()));
    const auto activation = [&](int i) {
      return picked_[i] != nullptr ? picked_[i]->activation
                                   : ways_[i].front().activation;
    };
    const auto backward = [&](int i) {
      return picked_[i] != nullptr ? picked_[i]->backward
                                   : ways_[i].back().backward;
    };
    const auto is_over = [&](int rank, int64_t bytes) {
      return (only < 0 || rank == only) && bytes > LimitOf(rank);
    };
    order.clear();
    for (const int i : members) {
      Held(i) = 0;
      waits_[i] = 0;
      ready_[rank_of_[i]].clear();
    }
    for (const int i : members) {
      Held(i) += activation(i);
      for (const GraphEdge& edge : graph_.producers_of(pairs_[i])) {
        if (local_[edge.pair] >= 0) ++waits_[local_[edge.pair]];
      }
    }
    for (const int i : members) {
      const int r = rank_of_[i];
      if (is_over(r, held_[r])) return Shortage{ranks_[r], held_[r]};
    }
    std::vector<int> ranks_to_try;
    const auto make_ready = [&](int i) {
      ready_[rank_of_[i]].push_back(i);
      ranks_to_try.push_back(rank_of_[i]);
    };
    for (size_t at = members.size(); at-- > 0;) {
      if (waits_[members[at]] == 0) make_ready(members[at]);
    }
    while (!ranks_to_try.empty()) {
      const int r = ranks_to_try.back();
      ranks_to_try.pop_back();
      for (size_t at = 0; at < ready_[r].size();) {
        const int i = ready_[r][at];
        if (is_over(r, held_[r] - activation(i) + backward(i))) {
          ++at;
          continue;
        }
        held_[r] -= activation(i);
        order.push_back(i);
        ready_[r].erase(ready_[r].begin() + static_cast<int64_t>(at));
        for (const GraphEdge& edge : graph_.producers_of(pairs_[i])) {
          const int producer = local_[edge.pair];
          if (producer >= 0 && --waits_[producer] == 0) make_ready(producer);
        }
        at = 0;
      }
    }
    std::optional<Shortage> least;
    for (const int i : members) {
      const int r = rank_of_[i];
      for (const int stuck : ready_[r]) {
        const int64_t bytes = held_[r] - activation(stuck) + backward(stuck);
        if (!least || bytes < least->bytes) least = {ranks_[r], bytes};
      }
      ready_[r].clear();
    }
    return least;
  }

  // Whether a sink and what it waits for, which holds all its activations
  // before its first backward, cannot fit on some rank even where other ranks
  // have no limit. Then shortage_ says so.
  bool NoOrderFits() {
    std::fill(picked_.begin(), picked_.end(), nullptr);
    std::vector<int32_t> members, order;
    std::vector<int32_t> member_of(pairs_.size(), -1);
    int64_t work = 0;
    for (const int sink : sinks_) {
      members.assign(1, sink);
      member_of[sink] = sink;
      for (size_t at = 0; at < members.size(); ++at) {
        for (const GraphEdge& edge : graph_.producers_of(pairs_[members[at]])) {
          const int producer = local_[edge.pair];
          if (producer < 0 || member_of[producer] == sink) continue;
          member_of[producer] = sink;
          members.push_back(producer);
        }
      }
      std::sort(members.begin(), members.end());
      work += static_cast<int64_t>(members.size());
      if (work > kMostProofWork || work_.over()) return false;
      if (!RunMembers(members, /*only=*/-1, order)) continue;
      for (int r = 0; r < static_cast<int>(ranks_.size()); ++r) {
        work += static_cast<int64_t>(members.size());
        if (work > kMostProofWork || work_.over()) return false;
        if (auto shortage = RunMembers(members, r, order)) {
          shortage_ = *shortage;
          shortage_.every_order = true;
          return true;
        }
      }
    }
    return false;
  }

  // RunMembers of all; on success and with `record`, steps_ is the order.
  bool RunForwardsFirst(bool record) {
    std::vector<int32_t> order;
    if (const auto shortage = RunMembers(everything_, /*only=*/-1, order)) {
      if (shortage_.rank < 0) shortage_ = *shortage;
      return false;
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
    if (SearchIsOver() || !RunForwardsFirst(/*record=*/false)) return false;
    while (i < pairs_.size() && ways_[i].size() == 1) {
      picked_[i] = &ways_[i].front();
      ++i;
    }
    if (i == pairs_.size()) return true;
    for (const Way& way : ways_[i]) {
      picked_[i] = &way;
      if (BranchOnChoices(i + 1)) return true;
      for (size_t j = i; j < pairs_.size(); ++j) picked_[j] = nullptr;
      if (SearchIsOver()) return false;
    }
    return false;
  }

  // A descent of SearchSteps without a way back, in time that grows little
  // faster than the component: backwards as soon as they fit, else the last F
  // that is ready and fits, places off by up to `spread` at random; every pair
  // run its leanest way. With `random`, some are run in another way that fits,
  // and the descent ends with the work.
  bool StepGreedily(std::mt19937_64* random, int64_t spread) {
    const auto n = static_cast<int>(pairs_.size());
    steps_.clear();
    std::fill(held_.begin(), held_.end(), 0);
    std::vector<int> waits_forward(n, 0), waits_backward(n, 1);
    std::priority_queue<std::pair<int64_t, int>> forwards;
    // [rank]: ready, and found not to fit when the rank last held less.
    std::vector<std::vector<std::pair<int64_t, int>>> stalled_forwards(
        ranks_.size());
    std::vector<std::vector<int>> backwards(ranks_.size());
    std::vector<int> ranks_to_try;
    const auto below = [random](int64_t most) {
      return static_cast<int64_t>((*random)() % static_cast<uint64_t>(most));
    };
    const auto forward_ready = [&](int i) {
      forwards.push({i + (spread > 0 ? below(spread + 1) : 0), i});
    };
    const auto backward_waits_less = [&](int i) {
      if (--waits_backward[i] > 0) return;
      backwards[rank_of_[i]].push_back(i);
      ranks_to_try.push_back(rank_of_[i]);
    };
    const bool vary_ways = random != nullptr && below(2) == 0;
    for (int i = 0; i < n; ++i) {
      picked_[i] = &ways_[i].front();
      waits_backward[i] += graph_.consumers_of(pairs_[i]).size();
      waits_forward[i] = ProducersOf(i);
      if (waits_forward[i] == 0) forward_ready(i);
    }
    while (random == nullptr || !work_.over()) {
      while (!ranks_to_try.empty()) {
        const int r = ranks_to_try.back();
        ranks_to_try.pop_back();
        bool moved = false;
        for (size_t at = 0; at < backwards[r].size();) {
          const int i = backwards[r][at];
          const int64_t after = held_[r] - picked_[i]->activation;
          work_.Spend(1);
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
        for (const auto& forward : stalled_forwards[r]) forwards.push(forward);
        stalled_forwards[r].clear();
      }
      if (forwards.empty()) break;
      const std::pair<int64_t, int> forward = forwards.top();
      const int i = forward.second;
      forwards.pop();
      work_.Spend(2);
      if (Held(i) + picked_[i]->activation > Limit(i)) {
        stalled_forwards[rank_of_[i]].push_back(forward);
        continue;
      }
      if (vary_ways && below(2) == 0) {
        const Way& other = ways_[i][below(ways_[i].size())];
        if (Held(i) + other.activation <= Limit(i)) picked_[i] = &other;
      }
      Held(i) += picked_[i]->activation;
      steps_.push_back({pairs_[i], false});
      for (const GraphEdge& edge : graph_.consumers_of(pairs_[i])) {
        if (--waits_forward[local_[edge.pair]] == 0) {
          forward_ready(local_[edge.pair]);
        }
      }
      backward_waits_less(i);
    }
    return steps_.size() == 2 * pairs_.size();
  }

  // Descents from nearly in order to quite random.
  bool TryDescents(std::mt19937_64& random) {
    const auto most = static_cast<int64_t>(pairs_.size());
    for (int d = 0; d < kDescents && !work_.over(); ++d) {
      const int64_t spread = std::min(most, int64_t{1} << d % kSpreads);
      if (StepGreedily(&random, spread)) return true;
    }
    return false;
  }

  // Depth-first search over the order of F steps and their choices.
  bool SearchSteps() {
    steps_.clear();
    seen_.clear();
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
    work_.Spend(static_cast<int64_t>(pairs_.size()));
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
    if (!SearchIsOver() && seen_.insert(StateKey()).second) {
      // Later sweeps first: they lead to backwards soonest.
      // Once the work is spent, no branch that is left is tried.
      for (size_t i = pairs_.size(); i-- > 0 && !SearchIsOver();) {
        if (state_[i] != 0 || !Ready(i)) continue;
        for (size_t w = 0; w < ways_[i].size() && !SearchIsOver(); ++w) {
          const Way& way = ways_[i][w];
          if (Held(i) + way.activation > Limit(i)) {
            Fail(rank_of_[i], Held(i) + way.activation);
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
  WorkLeft& work_;
  int64_t search_until_ = 0;  // work left at which SearchAll ends
  std::vector<int32_t> sweeps_;
  std::vector<int32_t> pairs_;       // of the component, producers first
  std::vector<int32_t>& local_;      // index in pairs_, or -1
  std::vector<int32_t> everything_;  // 0 .. pairs - 1
  std::vector<int32_t> sinks_;       // last pairs, as indices in pairs_
  std::vector<int32_t> ranks_;       // those stood on, ascending
  std::vector<int32_t> rank_of_;     // of pair i: index in ranks_
  std::vector<std::vector<Way>> ways_;
  std::vector<const Way*> picked_;
  std::vector<int64_t> held_;  // [index in ranks_]
  std::vector<SafeStep> steps_;
  bool single_sink_ = true;
  bool forwards_first_ = true;
  Shortage shortage_;
  // RunMembers: consumers to come, and backwards by index in ranks_.
  std::vector<int32_t> waits_;
  std::vector<std::deque<int32_t>> ready_;
  // SearchSteps: 0 before F, 1 + way after it, kDone after the backward.
  std::vector<int32_t> state_;
  std::vector<std::pair<size_t, int32_t>> undo_;
  absl::flat_hash_set<std::string> seen_;
};

std::vector<std::vector<int32_t>> Components(const ProblemGraph& graph) {
  DisjointSets sets(graph.sweeps);
  const auto trains = [&](int s) {
    return graph.has_backward(graph.sweep_first_pair[s]);
  };
  for (int s = 0; s < graph.sweeps; ++s) {
    for (const GraphEdge& edge :
         graph.producers_of(graph.sweep_first_pair[s])) {
      const int before = graph.pair_sweep[edge.pair];
      if (trains(s) && trains(before)) sets.Join(s, before);
    }
  }
  std::vector<std::vector<int32_t>> components;
  std::vector<int32_t> index(graph.sweeps, -1);
  for (int s = 0; s < graph.sweeps; ++s) {
    if (!trains(s)) continue;
    const int r = sets.Find(s);
    if (index[r] < 0) {
      index[r] = static_cast<int32_t>(components.size());
      components.emplace_back();
    }
    components[index[r]].push_back(s);
  }
  return components;
}

// `gave_up`: the search ended before all orders were seen.
absl::Status DoesNotFit(const ProblemGraph& graph, const Shortage& shortage,
                        bool gave_up) {
  const int64_t limit = graph.limit_bytes[shortage.rank];
  const std::string holds = absl::StrCat("rank ", shortage.rank, " would hold ",
                                         shortage.bytes, " bytes");
  const std::string its_limit = absl::StrCat(", its limit is ", limit);
  std::string rule;
  if (shortage.every_order) {
    rule = absl::StrCat("no schedule exists: ", holds, its_limit);
  } else if (gave_up) {
    rule = absl::StrCat("no schedule was found, one may exist: ", holds,
                        " in the first order tried", its_limit);
  } else {
    rule =
        absl::StrCat("no schedule exists: ", holds, " in the first order tried",
                     its_limit, ", and every other order exceeds a limit too");
  }
  return WithField(absl::ResourceExhaustedError(rule),
                   absl::StrCat("memory_limit_bytes[", shortage.rank, "]"),
                   absl::StrCat(limit));
}

}  // namespace

int64_t BackwardStepBytes(const GraphChoice& choice, PairMode mode,
                          bool fused) {
  if (mode == PairMode::kSplit && !fused) {
    return std::max(choice.input_grad_bytes, choice.weight_grad_bytes);
  }
  return choice.backward_bytes;
}

absl::StatusOr<SafePlan> FindSafePlan(const ProblemGraph& graph,
                                      const SearchBudget& budget,
                                      int64_t most_work) {
  SafePlan plan;
  plan.component_of_sweep.assign(graph.sweeps, -1);
  plan.choice.assign(graph.pairs, 0);
  plan.fused.assign(graph.pairs, 0);
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
      return DoesNotFit(graph, {r, choices[best].activation_bytes, true},
                        /*gave_up=*/false);
    }
  }
  std::vector<std::vector<int32_t>> components = Components(graph);
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
  WorkLeft work(budget, most_work);
  for (size_t c = 0; c < components.size(); ++c) {
    ComponentSolver solver(graph, ways, std::move(components[c]),
                           std::move(pairs[c]), local, work);
    if (!solver.Solve()) {
      return DoesNotFit(graph, solver.shortage(), work.over());
    }
    plan.components.push_back(solver.component());
    solver.WriteWays(plan);
  }
  return plan;
}

}  // namespace pipeweaver::search
