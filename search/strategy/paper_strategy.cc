// The paper's search; see paper_strategy.h.

#include "search/strategy/paper_strategy.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "search/problem/bound.h"
#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_search.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/strategy.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

constexpr int kRollouts = 10;
constexpr double kAlpha = 2.0, kBeta = 0.1;
constexpr int64_t kFarAway = int64_t{1} << 50;

struct Node {
  int32_t parent = -1;
  int32_t group = -1;  // the group whose next sweep this node appends
  int32_t visits = 0;
  double score = 0;
  std::vector<int32_t> children;
  std::vector<int32_t> untried;  // groups
};

class TreeSearch {
 public:
  TreeSearch(const ProblemGraph& graph, const SafePlan& plan,
             const SearchOptions& options)
      : graph_(graph),
        options_(options),
        model_(graph, plan),
        scheduler_(model_),
        choices_(graph),
        bound_ns_(options.lower_bound_ns ? *options.lower_bound_ns
                                         : LowerBound(graph)),
        random_(options.seed) {
    // Producers before consumers; a group's sweeps keep this order.
    std::vector<int32_t> group_of_component(plan.components.size(), -1);
    for (const int p : graph.topological) {
      const int s = graph.pair_sweep[p];
      if (p != graph.sweep_first_pair[s]) continue;
      const int component = plan.component_of_sweep[s];
      int32_t group = component >= 0 ? group_of_component[component] : -1;
      if (group < 0) {
        group = static_cast<int32_t>(sweeps_.size());
        sweeps_.emplace_back();
        if (component >= 0) group_of_component[component] = group;
      }
      sweeps_[group].push_back(s);
    }
    lean_.choice.assign(graph.pairs, 0);
    lean_.fused.assign(graph.pairs, Ways::kApart);
    for (int p = 0; p < graph.pairs; ++p) {
      const auto choices = graph.choices_of(p);
      for (int c = 1; c < choices.size(); ++c) {
        if (choices[c].activation_bytes <
            choices[lean_.choice[p]].activation_bytes) {
          lean_.choice[p] = c;
        }
      }
    }
    rule_.alternate = true;
    rule_.key.resize(3 * static_cast<size_t>(graph.pairs));
  }

  SearchResult Run() {
    std::vector<int32_t> given;
    for (size_t g = 0; g < sweeps_.size(); ++g) {
      given.insert(given.end(), sweeps_[g].size(), static_cast<int32_t>(g));
    }
    first_ns_ = std::max<int64_t>(1, Evaluate(given));
    nodes_.emplace_back();
    nodes_[0].untried = Groups(std::vector<int32_t>(sweeps_.size(), 0));
    while (!Done()) Iterate();
    SearchResult result;
    result.schedule = ToSchedule(graph_, best_);
    result.makespan_ns = best_.makespan_ns;
    result.evaluations = evaluations_;
    return result;
  }

 private:
  bool Done() const {
    const SearchBudget& budget = options_.budget;
    return best_.makespan_ns <= bound_ns_ ||
           (budget.evaluations > 0 && evaluations_ >= budget.evaluations) ||
           budget.Stopped() ||
           (!nodes_.empty() && nodes_[0].untried.empty() &&
            nodes_[0].children.empty());
  }

  // The groups that have sweeps left after `used` of each.
  std::vector<int32_t> Groups(const std::vector<int32_t>& used) const {
    std::vector<int32_t> groups;
    for (size_t g = 0; g < sweeps_.size(); ++g) {
      if (used[g] < static_cast<int32_t>(sweeps_[g].size())) {
        groups.push_back(static_cast<int32_t>(g));
      }
    }
    return groups;
  }

  void Iterate() {
    int32_t at = 0;
    std::vector<int32_t> sequence, used(sweeps_.size(), 0);
    const auto append = [&](int32_t group) {
      sequence.push_back(group);
      ++used[group];
    };
    while (nodes_[at].untried.empty() && !nodes_[at].children.empty()) {
      at = SelectChild(at);
      append(nodes_[at].group);
    }
    if (!nodes_[at].untried.empty()) {
      const size_t pick = random_() % nodes_[at].untried.size();
      const int32_t group = nodes_[at].untried[pick];
      nodes_[at].untried.erase(nodes_[at].untried.begin() +
                               static_cast<int64_t>(pick));
      append(group);
      Node child;
      child.parent = at;
      child.group = group;
      child.untried = Groups(used);
      nodes_[at].children.push_back(static_cast<int32_t>(nodes_.size()));
      at = static_cast<int32_t>(nodes_.size());
      nodes_.push_back(std::move(child));
    }
    double score = 0;
    for (int i = 0; i < kRollouts && !Done(); ++i) {
      std::vector<int32_t> rest;
      for (size_t g = 0; g < sweeps_.size(); ++g) {
        rest.insert(rest.end(), sweeps_[g].size() - used[g],
                    static_cast<int32_t>(g));
      }
      for (size_t j = rest.size(); j > 1; --j) {
        std::swap(rest[j - 1], rest[random_() % j]);
      }
      rest.insert(rest.begin(), sequence.begin(), sequence.end());
      score = std::max(
          score, static_cast<double>(first_ns_) /
                     static_cast<double>(std::max<int64_t>(1, Evaluate(rest))));
    }
    for (; at >= 0; at = nodes_[at].parent) {
      nodes_[at].score = std::max(nodes_[at].score, score);
      ++nodes_[at].visits;
    }
  }

  int32_t SelectChild(int32_t at) const {
    int32_t best = nodes_[at].children.front();
    double best_value = -1;
    for (const int32_t child : nodes_[at].children) {
      const double value =
          std::pow(nodes_[child].score, kAlpha) +
          kBeta * std::sqrt(std::log(std::max(1, nodes_[at].visits)) /
                            std::max(1, nodes_[child].visits));
      if (value > best_value) {
        best_value = value;
        best = child;
      }
    }
    return best;
  }

  // Interleaves and chooses memory for a sequence of groups, each standing for
  // its next sweep.
  int64_t Evaluate(const std::vector<int32_t>& sequence) {
    ++evaluations_;
    std::vector<int32_t> next(sweeps_.size(), 0);
    int64_t place = 0;
    for (const int32_t group : sequence) {
      const int s = sweeps_[group][next[group]++];
      for (int p = graph_.sweep_first_pair[s];
           p < graph_.sweep_first_pair[s + 1]; ++p) {
        rule_.key[3 * p + kForwardTask] = place;
        rule_.key[3 * p + kGradientTask] = place;
        rule_.key[3 * p + kWeightTask] = kFarAway + place;
      }
      ++place;
    }
    TaskOrder order;
    scheduler_.Run(rule_, lean_, order);
    choices_.Load(order);
    choices_.SpeedUpWhereMemoryAllows();
    if (best_.tasks.empty() || choices_.makespan_ns() < best_.makespan_ns) {
      choices_.Save(best_);
    }
    return choices_.makespan_ns();
  }

  const ProblemGraph& graph_;
  const SearchOptions& options_;
  const ListModel model_;
  ListScheduler scheduler_;
  OrderSearch choices_;
  const int64_t bound_ns_;
  std::mt19937_64 random_;
  std::vector<std::vector<int32_t>> sweeps_;  // [group], in their fixed order
  Ways lean_;
  ListRule rule_;
  std::vector<Node> nodes_;
  TaskOrder best_;
  int64_t first_ns_ = 1;
  int64_t evaluations_ = 0;
};

}  // namespace

absl::StatusOr<SearchResult> PaperStrategy::Solve(
    const ProblemGraph& graph, const SearchOptions& options) const {
  PW_ASSIGN_OR_RETURN(const SafePlan plan, FindSafePlan(graph, options.budget));
  return TreeSearch(graph, plan, options).Run();
}

}  // namespace pipeweaver::search
