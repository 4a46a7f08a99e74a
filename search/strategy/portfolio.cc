// The strategy that serves requests; see portfolio.h.

#include "search/strategy/portfolio.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_search.h"
#include "search/strategy/pipeline_rule.h"
#include "search/strategy/rebuild_search.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/strategy.h"
#include "search/strategy/worker_pool.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

using Clock = std::chrono::steady_clock;

// Rules get this share of the budget, orders the rest; rules more where prices
// of memory are to be found and orders would get less than kLeastWalk moves for
// every task.
constexpr double kRuleShare = 0.5;
constexpr double kLargeRuleShare = 0.85;
constexpr double kLeastWalk = 1;
// Orders of groups from which rules are varied: one for so many schedules that
// rules are good for, and at most so many; and the share of the rules' budget
// that the first may take.
constexpr double kEvaluationsPerDescent = 75;
constexpr size_t kDescents = 4;
constexpr double kFirstDescentShare = 0.7;
// The share of the rules' budget in which settings that did well before are
// varied, before anything else is tried.
constexpr double kWarmShare = 0.5;
// Starts are compared (Compare) as far as rules are good for so many
// evaluations a start: ten times what it takes.
constexpr double kEvaluationsPerStart = 330;
// Schedules improved side by side.
constexpr int kElites = 3;
// Proposals of local search that count, and take about as long, as one list
// schedule.
constexpr int64_t kMovesPerEvaluation = 64;
constexpr int kRulesPerBatch = 8;
// Evaluations left without a limit; may be multiplied by small numbers.
constexpr int64_t kNoLimit = int64_t{1} << 48;
// Pairs scheduled by one job of random rules: small problems take many rules
// a job, so that handing out jobs costs little.
constexpr int kPairsPerJob = 1024;
constexpr int64_t kEndless = std::numeric_limits<int64_t>::max();
constexpr int64_t kMovesPerRound = 2048;
// How hot walks that rebuild start, and how cold all that are hot end
// (WalkOptions::temperature).
constexpr double kHottest = 1e-3;
constexpr double kColdest = 2e-5;
// A problem of so few pairs has few moves: walks start so hot that all of them
// are made, in rounds short enough to cool in.
constexpr int kTinyPairs = 12;
constexpr int64_t kTinyMovesPerRound = 128;
constexpr double kTinyHottest = 1;
// Share of the walks between exchanges.
constexpr double kExchangeEvery = 0.15;

struct Candidate {
  PipelineRule rule;
  TaskOrder order;
};

class Search {
 public:
  Search(const ProblemGraph& graph, const SafePlan& plan,
         const SearchOptions& options)
      : graph_(graph),
        options_(options),
        model_(graph, plan),
        rules_(model_),
        bound_ns_(options.lower_bound_ns ? *options.lower_bound_ns
                                         : LowerBound(graph)),
        start_(Clock::now()),
        pool_(options.threads) {
    for (int i = 0; i < options.threads; ++i) {
      schedulers_.push_back(std::make_unique<ListScheduler>(model_));
    }
    stop_ = [this] { return Stopped(); };
  }

  SearchResult Run() {
    TryRules();
    const PipelineRule& rule = elites_.front().rule;
    std::vector<int32_t> settings = PipelineRules::ToSettings(rule);
    if (options_.warm_start != nullptr) {
      std::optional<TaskOrder> order =
          FromSchedule(graph_, *options_.warm_start);
      if (order) Offer({rule, *std::move(order)});
    }
    WalkOn();
    SearchResult result;
    result.settings = std::move(settings);
    result.schedule = ToSchedule(graph_, elites_.front().order);
    result.makespan_ns = elites_.front().order.makespan_ns;
    result.evaluations = evaluations_;
    return result;
  }

 private:
  bool Stopped() const { return options_.budget.Stopped(); }

  // The share of the budget that is used; 1: over. Where schedules are counted,
  // time only ends the search: what is done depends on the count alone.
  double Progress() const {
    if (!elites_.empty() &&
        (elites_.front().order.makespan_ns <= bound_ns_ || Stopped())) {
      return 1;
    }
    const SearchBudget& budget = options_.budget;
    double used = 0;
    if (budget.evaluations > 0) {
      used = static_cast<double>(evaluations_) /
             static_cast<double>(budget.evaluations);
    } else if (budget.deadline.has_value()) {
      const double passed =
          std::chrono::duration<double>(Clock::now() - start_).count();
      const double whole =
          std::chrono::duration<double>(*budget.deadline - start_).count();
      used = whole > 0 ? passed / whole : 1;
    }
    return std::min(used, 1.0);
  }

  // How many schedules the whole budget is good for, at the pace so far.
  double ExpectedEvaluations() const {
    const double progress = Progress();
    return progress > 0 ? static_cast<double>(evaluations_) / progress
                        : static_cast<double>(kNoLimit);
  }

  double RuleShare() const {
    const double walk =
        (1 - kRuleShare) * ExpectedEvaluations() * kMovesPerEvaluation;
    return rules_.prices() > 1 && walk < kLeastWalk * 2 * graph_.pairs
               ? kLargeRuleShare
               : kRuleShare;
  }

  int64_t EvaluationsLeft() const {
    const int64_t budget = options_.budget.evaluations;
    return budget > 0 ? std::min(budget - evaluations_, kNoLimit) : kNoLimit;
  }

  // Adds a candidate unless there are enough better ones, or one like it.
  void Offer(Candidate candidate) {
    size_t at = 0;
    while (at < elites_.size() &&
           elites_[at].order.makespan_ns <= candidate.order.makespan_ns) {
      if (elites_[at].order.makespan_ns == candidate.order.makespan_ns) return;
      ++at;
    }
    if (at >= kElites) return;
    elites_.insert(elites_.begin() + static_cast<int64_t>(at),
                   std::move(candidate));
    if (elites_.size() > kElites) elites_.pop_back();
  }

  // Schedules by `rule`; no tasks where the makespan is over `worth_ns`.
  void Schedule(int worker, const PipelineRule& rule, int64_t worth_ns,
                TaskOrder& order) {
    thread_local ListRule list;
    thread_local Ways ways;
    rules_.Build(rule, list, ways);
    schedulers_[worker]->Run(list, ways, order, worth_ns);
  }

  // The greatest makespan that still counts for something beside `best`.
  int64_t WorthNs(const TaskOrder& best) const {
    if (best.tasks.empty() || elites_.size() < kElites) return kEndless;
    return std::max(best.makespan_ns, elites_.back().order.makespan_ns);
  }

  // Schedules all `rules` as far as the budget goes, in batches, offers them,
  // and keeps in `best` the best of them, if better.
  void TryAll(const std::vector<PipelineRule>& rules, double until,
              Candidate& best) {
    for (size_t done = 0; done < rules.size();) {
      if (!elites_.empty() && Progress() >= until) return;
      // The very first schedule alone: it must be there soon.
      const int64_t most = elites_.empty() ? 1 : kRulesPerBatch;
      const int count = static_cast<int>(
          std::min({most, static_cast<int64_t>(rules.size() - done),
                    std::max<int64_t>(1, EvaluationsLeft())}));
      std::vector<Candidate> batch(count);
      std::vector<int> tried(count, 0);
      const int64_t worth_ns = WorthNs(best.order);
      pool_.Run(count, [&](int worker, int i) {
        if (!elites_.empty() && Stopped()) return;
        batch[i].rule = rules[done + i];
        Schedule(worker, batch[i].rule, worth_ns, batch[i].order);
        ++tried[i];
      });
      for (int i = 0; i < count; ++i) {
        evaluations_ += tried[i];
        Candidate& candidate = batch[i];
        if (candidate.order.tasks.empty()) continue;
        if (best.order.tasks.empty() ||
            candidate.order.makespan_ns < best.order.makespan_ns) {
          best = candidate;
        }
        Offer(std::move(candidate));
      }
      done += count;
    }
  }

  // Varies one part after the other, each from the best so far, as long as that
  // helps.
  void Descend(Candidate& start, double until) {
    while (Progress() < until) {
      const int64_t before = start.order.makespan_ns;
      for (const PipelineRules::Part part : PipelineRules::kParts) {
        TryAll(rules_.Variations(start.rule, part), until, start);
      }
      if (start.order.makespan_ns >= before) break;
    }
  }

  // Varies the parts that matter most of several starts, and sorts all by
  // makespan: what looks best before its rhythm and prices suit it need not be
  // best with them.
  void Compare(std::vector<Candidate>& starts) {
    const double rules = RuleShare() * ExpectedEvaluations();
    const size_t most = std::min(
        starts.size(), static_cast<size_t>(rules / kEvaluationsPerStart));
    for (size_t i = 0; i < most && most > 1; ++i) {
      for (const PipelineRules::Part part : PipelineRules::kMainParts) {
        TryAll(rules_.Variations(starts[i].rule, part), RuleShare(), starts[i]);
      }
    }
    SortByMakespan(starts);
  }

  void TryRules() {
    // The best rule of every order of groups.
    std::vector<Candidate> starts;
    const auto add_start = [&](const std::vector<PipelineRule>& rules) {
      Candidate best;
      TryAll(rules, RuleShare(), best);
      if (!best.order.tasks.empty()) starts.push_back(std::move(best));
    };
    const std::optional<PipelineRule> warm =
        rules_.FromSettings(options_.warm_settings);
    if (warm) {
      add_start({*warm});
      Descend(starts[0], RuleShare() * kWarmShare);
    }
    add_start(rules_.FirstRules());
    std::vector<std::vector<PipelineRule>> others =
        rules_.OtherOrders(elites_.front().rule);
    if (options_.warm_start != nullptr) {
      PipelineRule rule = elites_.front().rule;
      rule.groups = rules_.GroupOrderOf(*options_.warm_start);
      rule.group_order = PipelineRule::GroupOrder::kAsGiven;
      others.push_back({rule});
    }
    for (const std::vector<PipelineRule>& rules : others) add_start(rules);
    SortByMakespan(starts);
    if (starts.size() > kDescents) starts.resize(kDescents);
    Compare(starts);
    const double descents = std::max(
        1.0, RuleShare() * ExpectedEvaluations() / kEvaluationsPerDescent);
    for (size_t i = 0;
         i < starts.size() && static_cast<double>(i + 1) <= descents; ++i) {
      Descend(starts[i],
              RuleShare() * (kFirstDescentShare + (1 - kFirstDescentShare) *
                                                      static_cast<double>(i) /
                                                      kDescents));
    }
    MutateRules(std::move(starts));
  }

  static void SortByMakespan(std::vector<Candidate>& candidates) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Candidate& a, const Candidate& b) {
                       return a.order.makespan_ns < b.order.makespan_ns;
                     });
  }

  // Random changes, each job a short climb of its own from one of `climbs`,
  // half of them from the best.
  void MutateRules(std::vector<Candidate> climbs) {
    const int64_t steps =
        std::clamp<int64_t>(kPairsPerJob / graph_.pairs, 1, 16);
    for (uint64_t round = 0; Progress() < RuleShare(); ++round) {
      SortByMakespan(climbs);
      const int jobs = static_cast<int>(
          std::clamp<int64_t>(EvaluationsLeft() / steps, 1, kRulesPerBatch));
      const auto from = [&](int job) -> const Candidate& {
        return climbs[job % 2 == 0 ? 0 : (job / 2 + round) % climbs.size()];
      };
      std::vector<Candidate> results(jobs);
      std::vector<int64_t> evaluated(jobs, 0);
      pool_.Run(jobs, [&](int worker, int i) {
        std::mt19937_64 random(options_.seed * 0x9e3779b97f4a7c15u +
                               round * kRulesPerBatch + i);
        Candidate& best = results[i];
        best.rule = from(i).rule;
        best.order.makespan_ns = from(i).order.makespan_ns;
        Candidate next;
        for (int64_t step = 0; step < steps && !Stopped(); ++step) {
          next.rule = rules_.Mutate(best.rule, random);
          // Some jobs look further away.
          for (int more = i / 2; more > 1; --more) {
            next.rule = rules_.Mutate(next.rule, random);
          }
          Schedule(worker, next.rule, best.order.makespan_ns, next.order);
          ++evaluated[i];
          if (!next.order.tasks.empty()) std::swap(best, next);
        }
      });
      std::vector<Candidate> next = climbs;
      for (int i = 0; i < jobs; ++i) {
        evaluations_ += evaluated[i];
        if (results[i].order.tasks.empty()) continue;
        Candidate& climb = next[&from(i) - climbs.data()];
        if (results[i].order.makespan_ns <= climb.order.makespan_ns) {
          climb = results[i];
        }
        Offer(std::move(results[i]));
      }
      climbs = std::move(next);
    }
  }

  // One of the elites, and how it is improved.
  struct Walk {
    // Moves on the critical path, or schedules built anew.
    std::unique_ptr<OrderSearch> orders;
    std::unique_ptr<RebuildSearch> rebuilt;
    TaskOrder best;
  };

  bool Rebuilds(int walk) const {
    return walk > 0 && graph_.pairs > kTinyPairs;
  }

  void Load(Walk& walk, bool rebuilds, const TaskOrder& order) {
    if (rebuilds) {
      if (walk.rebuilt == nullptr) {
        walk.rebuilt = std::make_unique<RebuildSearch>(model_, rules_);
      }
      walk.rebuilt->Load(order);
      return;
    }
    if (walk.orders == nullptr) {
      walk.orders = std::make_unique<OrderSearch>(graph_);
    }
    walk.orders->Load(order);
    walk.orders->SpeedUpWhereMemoryAllows(&stop_);
    walk.orders->FuseWhereSlack();
  }

  // Of the best, what walks begin with, where the budget is for rules alone.
  void Polish() {
    Candidate& best = elites_.front();
    Walk walk;
    Load(walk, /*rebuilds=*/false, best.order);
    if (walk.orders->makespan_ns() < best.order.makespan_ns) {
      walk.orders->Save(best.order);
    }
  }

  // Walks from the elites side by side: the first downhill, the others by
  // rebuilding; all of a tiny problem's by moves, hotter and hotter.
  void WalkOn() {
    if (Progress() >= 1) {
      if (!Stopped()) Polish();
      return;
    }
    while (elites_.size() < kElites) elites_.push_back(elites_.front());
    std::vector<Walk> walks(kElites);
    for (int i = 0; i < kElites; ++i) walks[i].best = elites_[i].order;
    const double first_progress = Progress();
    double next_exchange = 0;
    for (uint64_t round = 0;; ++round) {
      const double progress = Progress();
      if (progress >= 1) return;
      // 0 at the start of the walks, 1 at the end of the budget.
      const double walked = (progress - first_progress) / (1 - first_progress);
      int walking =
          static_cast<int>(std::min<int64_t>(kElites, EvaluationsLeft()));
      if (Rebuilds(walking - 1) &&
          EvaluationsLeft() / walking * kMovesPerEvaluation <
              RebuildSearch::kMovesPerRebuild) {
        walking = 1;
      }
      const int64_t moves = std::min(
          graph_.pairs <= kTinyPairs ? kTinyMovesPerRound : kMovesPerRound,
          EvaluationsLeft() / walking * kMovesPerEvaluation);
      std::vector<int64_t> made(kElites, 0);
      pool_.Run(walking, [&](int worker, int i) {
        if (Stopped()) return;
        Walk& walk = walks[i];
        if (walk.orders == nullptr && walk.rebuilt == nullptr) {
          Load(walk, Rebuilds(i), walk.best);
        }
        WalkOptions options;
        options.moves = moves;
        options.seed =
            options_.seed * 0x9e3779b97f4a7c15u + round * kElites + i;
        options.stop_at_ns = bound_ns_;
        options.stop = &stop_;
        const double hot =
            Rebuilds(i) ? kHottest : kTinyHottest * i / (kElites - 1);
        if (hot > 0) {
          options.temperature = hot * std::pow(kColdest / hot, walked);
        }
        made[i] = Rebuilds(i) ? walk.rebuilt->Walk(
                                    options, *schedulers_[worker], walk.best)
                              : walk.orders->Anneal(options, walk.best);
      });
      for (int i = 0; i < walking; ++i) {
        evaluations_ += std::max<int64_t>(1, made[i] / kMovesPerEvaluation);
      }
      int best = 0, worst = 0;
      const auto makespan_ns = [&](int i) { return walks[i].best.makespan_ns; };
      for (int i = 1; i < kElites; ++i) {
        if (makespan_ns(i) < makespan_ns(best)) best = i;
        if (makespan_ns(i) >= makespan_ns(worst)) worst = i;
      }
      if (makespan_ns(best) < elites_.front().order.makespan_ns) {
        elites_.front().order = walks[best].best;
      }
      if (Progress() >= 1) return;
      // Now and then the worst goes on from where the best stood.
      if (walked >= next_exchange && best != worst && worst < walking) {
        next_exchange = walked + kExchangeEvery;
        Load(walks[worst], Rebuilds(worst), walks[best].best);
        walks[worst].best = walks[best].best;
      }
    }
  }

  const ProblemGraph& graph_;
  const SearchOptions& options_;
  const ListModel model_;
  const PipelineRules rules_;
  const int64_t bound_ns_;
  const Clock::time_point start_;
  WorkerPool pool_;
  std::vector<std::unique_ptr<ListScheduler>> schedulers_;  // [worker]
  std::function<bool()> stop_;
  std::vector<Candidate> elites_;  // best first
  int64_t evaluations_ = 0;
};

// Sums of times in a search stay below 2^63 when those of the problem stay
// below this.
constexpr double kMostTotalNs = 0x1p60;

double TotalNs(const ProblemGraph& graph) {
  double total = 0;
  for (int p = 0; p < graph.pairs; ++p) {
    for (const GraphChoice& choice : graph.choices_of(p)) {
      total += static_cast<double>(choice.forward_ns) +
               static_cast<double>(choice.input_grad_ns) +
               static_cast<double>(choice.weight_grad_ns) +
               static_cast<double>(std::max<int64_t>(0, choice.backward_ns));
    }
  }
  for (const GraphEdge& edge : graph.producers) {
    total += 2 * static_cast<double>(edge.delay_ns);
  }
  return total;
}

// Times in 1/2^8, at least 1 where they were: the order is what counts.
ProblemGraph ScaledDown(ProblemGraph graph) {
  const auto scale = [](int64_t& ns) { ns = ns == 0 ? 0 : 1 + (ns >> 8); };
  for (GraphChoice& choice : graph.choices) {
    scale(choice.forward_ns);
    scale(choice.input_grad_ns);
    scale(choice.weight_grad_ns);
    if (choice.has_backward()) scale(choice.backward_ns);
  }
  for (GraphEdge& edge : graph.producers) scale(edge.delay_ns);
  for (GraphEdge& edge : graph.consumers) scale(edge.delay_ns);
  return graph;
}

absl::StatusOr<SearchResult> SolveGraph(const ProblemGraph& graph,
                                        const SearchOptions& options) {
  PW_ASSIGN_OR_RETURN(const SafePlan plan, FindSafePlan(graph, options.budget));
  return Search(graph, plan, options).Run();
}

}  // namespace

absl::StatusOr<SearchResult> PortfolioStrategy::Solve(
    const ProblemGraph& graph, const SearchOptions& options) const {
  if (TotalNs(graph) < kMostTotalNs) return SolveGraph(graph, options);
  SearchOptions scaled_options = options;
  scaled_options.lower_bound_ns.reset();  // of times that are not scaled
  PW_ASSIGN_OR_RETURN(SearchResult result,
                      SolveGraph(ScaledDown(graph), scaled_options));
  PW_ASSIGN_OR_RETURN(const StageTimes times,
                      TimeSchedule(graph, result.schedule));
  result.makespan_ns = times.makespan_ns;
  return result;
}

}  // namespace pipeweaver::search
