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

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/timing.h"
#include "search/strategy/annealing.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_search.h"
#include "search/strategy/order_times.h"
#include "search/strategy/pipeline_rule.h"
#include "search/strategy/rebuild_search.h"
#include "search/strategy/reversed_time.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/strategy.h"
#include "search/strategy/worker_pool.h"
#include "semu/base/mutex.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

using Clock = std::chrono::steady_clock;

// Rules get this share of the budget, orders the rest; rules more where prices
// of memory are to be found and orders would get less than kLeastWalk moves for
// every task.
constexpr double kRuleShare = 0.65;
constexpr double kLargeRuleShare = 0.85;
constexpr double kLeastWalk = 1;
// Orders of groups from which rules are varied: one for so many schedules that
// rules are good for, and at most so many in each direction of time; and the
// share of the rules' budget that the first may take.
constexpr double kEvaluationsPerDescent = 75;
constexpr size_t kDescentsEachWay = 2;
constexpr double kFirstDescentShare = 0.7;
// The share of the rules' budget in which settings that did well before are
// varied, before anything else is tried.
constexpr double kWarmShare = 0.5;
// Starts are compared (Compare) as far as rules are good for so many
// evaluations a start: ten times what it takes.
constexpr double kEvaluationsPerStart = 330;
// How much longer a random change may make a rule's schedule, as a share of the
// makespan, in the mean: this at the start of the budget, nothing at the end of
// the rules' share.
constexpr double kRuleTemperature = 0.004;
// Schedules improved side by side.
constexpr int kElites = 3;
// Share of the walks' budget for short walks from every climb, where it is good
// for a round of each.
constexpr double kProbeShare = 0.25;
constexpr double kProbeCooling = 0.5;  // of the way from hottest to coldest
// What finding a plan in reversed time may take, in pair steps for every pair:
// time is better spent on schedules than on one more way to find them.
constexpr int64_t kReversedWorkPerPair = 64;
// Proposals of local search that count, and take about as long, as one list
// schedule.
constexpr int64_t kMovesPerEvaluation = 64;
constexpr int kRulesPerBatch = 8;
// Evaluations that a rule takes at most: it may be scheduled twice.
constexpr int kMostOfRule = 2;
// Evaluations left without a limit; may be multiplied by small numbers.
constexpr int64_t kNoLimit = int64_t{1} << 48;
// About how many pairs one job of random rules schedules, and its evaluations
// at most: small problems take many rules a job, so that handing out jobs costs
// little.
constexpr int kPairsPerJob = 2048;
constexpr int kMostPerJob = 16;
constexpr int64_t kEndless = std::numeric_limits<int64_t>::max();
constexpr int64_t kMovesPerRound = 2048;
constexpr int64_t kTurnsPerRound = 2;  // of a full one; else 1
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

// Makespans below which building a rule is known to give nothing: climbs come
// back to the same rules again and again. Thread-safe.
class KnownMakespans {
 public:
  // 0 where nothing is known.
  int64_t LeastNs(const std::vector<int32_t>& key) {
    const MutexLock lock(&mutex_);
    const auto known = least_ns_.find(key);
    return known == least_ns_.end() ? 0 : known->second;
  }

  void Add(std::vector<int32_t> key, int64_t least_ns) {
    const MutexLock lock(&mutex_);
    if (least_ns_.size() * key.size() > kMostNumbers) least_ns_.clear();
    int64_t& known_ns = least_ns_[std::move(key)];
    known_ns = std::max(known_ns, least_ns);
  }

 private:
  static constexpr size_t kMostNumbers = size_t{1} << 20;  // of all keys

  Mutex mutex_;
  absl::flat_hash_map<std::vector<int32_t>, int64_t> least_ns_
      ABSL_GUARDED_BY(mutex_);  // by PipelineRules::KeyOf
};

// Builds orders by rules in one direction of time. Thread-safe, each worker
// with a number of its own.
class Direction {
 public:
  // `graph` and `plan` must outlive it.
  Direction(const ProblemGraph& graph, const SafePlan& plan, int workers)
      : model_(graph, plan), rules_(model_), times_(workers) {
    for (int i = 0; i < workers; ++i) {
      schedulers_.push_back(std::make_unique<ListScheduler>(model_));
    }
  }

  const ListModel& model() const { return model_; }
  const PipelineRules& rules() const { return rules_; }
  ListScheduler& scheduler(int worker) const { return *schedulers_[worker]; }

  // The order by `rule`, in this direction; no tasks where the makespan is over
  // `worth_ns`. How long the first of two schedules is does not count: the
  // second is often good where the first is not. Does not build again what is
  // known to be over `worth_ns`, nor schedule a second time after `stop`.
  void Build(int worker, const PipelineRule& rule, int64_t worth_ns,
             const std::function<bool()>& stop, TaskOrder& order) {
    std::vector<int32_t> key = PipelineRules::KeyOf(rule);
    if (known_.LeastNs(key) > worth_ns) {
      order.tasks.clear();
      order.makespan_ns = kEndless;
      return;
    }
    thread_local ListRule list;
    thread_local Ways ways;
    rules_.Build(rule, list, ways);
    scheduler(worker).Run(list, ways, order, rule.twice ? kEndless : worth_ns);
    if (rule.twice) {
      if (!stop()) ScheduleAgain(worker, rule, worth_ns, order);
      if (order.makespan_ns > worth_ns) {
        order.tasks.clear();
        order.makespan_ns = kEndless;
      }
    }
    known_.Add(std::move(key),
               order.tasks.empty() ? worth_ns + 1 : order.makespan_ns);
  }

 private:
  // Leaves the better of `order` and one by its latest start times, as far as
  // that is not over `worth_ns`.
  void ScheduleAgain(int worker, const PipelineRule& rule, int64_t worth_ns,
                     TaskOrder& order) {
    thread_local ListRule list;
    thread_local Ways ways;
    thread_local TaskOrder again;
    std::unique_ptr<OrderTimes>& times = times_[worker];
    if (times == nullptr) times = std::make_unique<OrderTimes>(model_.graph());
    rules_.BuildAgain(rule, order, *times, list, ways);
    scheduler(worker).Run(list, ways, again,
                          std::min(order.makespan_ns, worth_ns));
    if (!again.tasks.empty()) std::swap(order, again);
  }

  const ListModel model_;
  const PipelineRules rules_;
  std::vector<std::unique_ptr<ListScheduler>> schedulers_;  // [worker]
  // [worker]; made when the worker first needs it.
  std::vector<std::unique_ptr<OrderTimes>> times_;
  KnownMakespans known_;
};

// Reversed time, with the problem and the plan that it needs.
struct ReversedDirection {
  ReversedDirection(ProblemGraph reversed, SafePlan safe, int workers)
      : graph(std::move(reversed)),
        plan(std::move(safe)),
        direction(graph, plan, workers) {}

  const ProblemGraph graph;
  const SafePlan plan;
  Direction direction;
};

struct Candidate {
  PipelineRule rule;
  bool reversed = false;  // `rule` builds in reversed time
  TaskOrder order;        // in the problem's own time
};

class Search {
 public:
  Search(const ProblemGraph& graph, const SafePlan& plan,
         const SearchOptions& options)
      : graph_(graph),
        options_(options),
        pool_(options.pool != nullptr ? *options.pool
                                      : own_pool_.emplace(options.threads)),
        forward_(graph, plan, pool_.threads()),
        bound_ns_(options.lower_bound_ns ? *options.lower_bound_ns
                                         : LowerBound(graph)),
        start_(Clock::now()) {
    stop_ = [this] { return Stopped(); };
  }

  SearchResult Run() {
    std::vector<Candidate> climbs = TryRules();
    if (options_.warm_start != nullptr) {
      std::optional<TaskOrder> order =
          FromSchedule(graph_, *options_.warm_start);
      if (order) {
        const Candidate& best = elites_.front();
        Offer({best.rule, best.reversed, *std::move(order)});
      }
    }
    WalkOn(std::move(climbs));
    SearchResult result;
    // The rule's numbers, and whether it is for reversed time.
    result.settings = PipelineRules::ToSettings(elites_.front().rule);
    result.settings.push_back(elites_.front().reversed ? 1 : 0);
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
    if (forward_.rules().prices() > 1 && walk < kLeastWalk * 2 * graph_.pairs) {
      return kLargeRuleShare;
    }
    return kRuleShare;
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

  // Whether there is such a problem and a plan for it is easily found; makes
  // reversed_ when first asked.
  bool MayReverse() {
    if (reversal_tried_) return reversed_ != nullptr;
    reversal_tried_ = true;
    std::optional<ProblemGraph> graph = InReversedTime(graph_);
    if (!graph) return false;
    absl::StatusOr<SafePlan> plan = FindSafePlan(
        *graph, options_.budget, kReversedWorkPerPair * graph_.pairs);
    if (!plan.ok()) return false;
    reversed_ = std::make_unique<ReversedDirection>(
        *std::move(graph), *std::move(plan), pool_.threads());
    return true;
  }

  Direction& DirectionOf(bool reversed) {
    return reversed ? reversed_->direction : forward_;
  }
  const PipelineRules& RulesOf(const Candidate& candidate) {
    return DirectionOf(candidate.reversed).rules();
  }

  static int EvaluationsOf(const PipelineRule& rule) {
    return rule.twice ? kMostOfRule : 1;
  }

  // Fills in the order of `candidate`; no tasks where the makespan is over
  // `worth_ns`.
  void Schedule(int worker, int64_t worth_ns, Candidate& candidate) {
    DirectionOf(candidate.reversed)
        .Build(worker, candidate.rule, worth_ns, stop_, candidate.order);
    if (candidate.reversed) ReverseTime(candidate.order);
  }

  // The greatest makespan that still counts for something beside `best`.
  int64_t WorthNs(const TaskOrder& best) const {
    if (best.tasks.empty() || elites_.size() < kElites) return kEndless;
    return std::max(best.makespan_ns, elites_.back().order.makespan_ns);
  }

  // Schedules all `rules` as far as the budget goes, in batches, offers them,
  // and keeps in `best` the best of them, if better.
  void TryAll(const std::vector<PipelineRule>& rules, bool reversed,
              double until, Candidate& best) {
    for (size_t done = 0; done < rules.size();) {
      if (!elites_.empty() && Progress() >= until) return;
      // The very first schedule alone: it must be there soon.
      const int64_t most = elites_.empty() ? 1 : kRulesPerBatch;
      const int64_t left = EvaluationsLeft();
      const int count = static_cast<int>(
          std::min({most, static_cast<int64_t>(rules.size() - done),
                    std::max<int64_t>(1, left / kMostOfRule)}));
      std::vector<Candidate> batch(count);
      std::vector<int> tried(count, 0);
      const int64_t worth_ns = WorthNs(best.order);
      pool_.Run(count, [&](int worker, int i) {
        if (!elites_.empty() && Stopped()) return;
        batch[i].rule = rules[done + i];
        batch[i].rule.twice &= !elites_.empty() && left >= kMostOfRule;
        batch[i].reversed = reversed;
        Schedule(worker, worth_ns, batch[i]);
        tried[i] = EvaluationsOf(batch[i].rule);
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

  void TryVariations(PipelineRules::Part part, double until, Candidate& best) {
    TryAll(RulesOf(best).Variations(best.rule, part), best.reversed, until,
           best);
  }

  // Varies one part after the other, each from the best so far, once: random
  // changes find what a second round would, sooner. Nothing where the budget
  // ended before `start` was scheduled.
  void Descend(Candidate& start, double until) {
    if (start.order.tasks.empty()) return;
    for (const PipelineRules::Part part : PipelineRules::kParts) {
      TryVariations(part, until, start);
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
        TryVariations(part, RuleShare(), starts[i]);
      }
    }
    SortByMakespan(starts);
  }

  // Varies settings that did well before.
  void TryWarmSettings(std::vector<Candidate>& starts) {
    std::vector<int32_t> settings = options_.warm_settings;
    if (settings.empty()) return;
    const bool reversed = settings.back() == 1;
    settings.pop_back();
    if (!forward_.rules().FromSettings(settings)) return;
    if (reversed && !MayReverse()) return;
    const auto rule = DirectionOf(reversed).rules().FromSettings(settings);
    if (!rule) return;
    Candidate& start = starts.emplace_back();
    TryAll({*rule}, reversed, RuleShare(), start);
    Descend(start, RuleShare() * kWarmShare);
  }

  // The best rule of every order of groups, in both directions of time.
  std::vector<Candidate> FindStarts() {
    std::vector<Candidate> starts, firsts(1);
    // What may be had at once comes first, then what did well before.
    std::vector<PipelineRule> rules = forward_.rules().FirstRules();
    TryAll({rules.front()}, false, RuleShare(), firsts[0]);
    rules.erase(rules.begin());
    TryWarmSettings(starts);
    TryAll(rules, false, RuleShare(), firsts[0]);
    if (Progress() < RuleShare() && MayReverse()) {
      TryAll(reversed_->direction.rules().FirstRules(), true, RuleShare(),
             firsts.emplace_back());
    }
    SortByMakespan(firsts);
    for (Candidate& first : firsts) {
      if (first.order.tasks.empty()) continue;
      std::vector<std::vector<PipelineRule>> others =
          RulesOf(first).OtherOrders(first.rule);
      if (options_.warm_start != nullptr && !first.reversed) {
        PipelineRule rule = first.rule;
        rule.groups = forward_.rules().GroupOrderOf(*options_.warm_start);
        rule.group_order = PipelineRule::GroupOrder::kAsGiven;
        others.push_back({rule});
      }
      for (const std::vector<PipelineRule>& order : others) {
        TryAll(order, first.reversed, RuleShare(), starts.emplace_back());
      }
      starts.push_back(std::move(first));
    }
    std::erase_if(starts, [](const Candidate& start) {
      return start.order.tasks.empty();
    });
    return starts;
  }

  // The best of the starts, from both directions of time in turn: which one is
  // the better shows only when its rules have been varied.
  static std::vector<Candidate> Best(std::vector<Candidate> starts) {
    SortByMakespan(starts);
    const bool first = !starts.empty() && starts.front().reversed;
    std::vector<Candidate> best[2];  // [reversed]
    for (Candidate& start : starts) {
      std::vector<Candidate>& way = best[start.reversed ? 1 : 0];
      if (way.size() < kDescentsEachWay) way.push_back(std::move(start));
    }
    starts.clear();
    for (size_t i = 0; i < kDescentsEachWay; ++i) {
      for (const bool reversed : {first, !first}) {
        std::vector<Candidate>& way = best[reversed ? 1 : 0];
        if (i < way.size()) starts.push_back(std::move(way[i]));
      }
    }
    return starts;
  }

  // Returns where the rules of the best starts stand in the end.
  std::vector<Candidate> TryRules() {
    std::vector<Candidate> starts = Best(FindStarts());
    Compare(starts);
    const double descents = std::max(
        1.0, RuleShare() * ExpectedEvaluations() / kEvaluationsPerDescent);
    for (size_t i = 0;
         i < starts.size() && static_cast<double>(i + 1) <= descents; ++i) {
      Descend(starts[i],
              RuleShare() * (kFirstDescentShare +
                             (1 - kFirstDescentShare) * static_cast<double>(i) /
                                 static_cast<double>(starts.size())));
    }
    return MutateRules(std::move(starts));
  }

  static void SortByMakespan(std::vector<Candidate>& candidates) {
    std::stable_sort(candidates.begin(), candidates.end(),
                     [](const Candidate& a, const Candidate& b) {
                       return a.order.makespan_ns < b.order.makespan_ns;
                     });
  }

  // Random changes, each job a short run of its own from where one of `climbs`
  // stands, half of them from the best. Returns where they stand in the end.
  std::vector<Candidate> MutateRules(std::vector<Candidate> climbs) {
    // Even: all rules are scheduled twice.
    const int64_t most_steps =
        kMostOfRule *
        std::clamp<int64_t>(kPairsPerJob / graph_.pairs / kMostOfRule, 1,
                            kMostPerJob / kMostOfRule);
    for (uint64_t round = 0;; ++round) {
      const double progress = Progress(), until = RuleShare();
      if (progress >= until) return climbs;
      const double temperature = kRuleTemperature * (1 - progress / until);
      SortByMakespan(climbs);
      const int64_t steps =
          std::min(most_steps, std::max<int64_t>(1, EvaluationsLeft()));
      const int jobs = static_cast<int>(
          std::clamp<int64_t>(EvaluationsLeft() / steps, 1, kRulesPerBatch));
      const auto climb_of = [&](int job) -> size_t {
        return job % 2 == 0 ? 0 : (job / 2 + round) % climbs.size();
      };
      // Where each job stands in the end, and the best that it came across; no
      // tasks where it never moved.
      std::vector<Candidate> ends(jobs), found(jobs);
      std::vector<int64_t> evaluated(jobs, 0);
      pool_.Run(jobs, [&](int worker, int i) {
        std::mt19937_64 random(options_.seed * 0x9e3779b97f4a7c15u +
                               round * kRulesPerBatch + i);
        const Candidate& start = climbs[climb_of(i)];
        Candidate& at = ends[i];
        at.rule = start.rule;
        at.reversed = start.reversed;
        at.order.makespan_ns = start.order.makespan_ns;
        Candidate next;
        next.reversed = at.reversed;
        const PipelineRules& rules = RulesOf(at);
        while (evaluated[i] < steps && !Stopped()) {
          next.rule = rules.Mutate(at.rule, random);
          // Some jobs look further away.
          for (int more = i / 2; more > 1; --more) {
            next.rule = rules.Mutate(next.rule, random);
          }
          next.rule.twice &= steps - evaluated[i] >= kMostOfRule;
          Schedule(worker,
                   BearableNs(at.order.makespan_ns, temperature, random), next);
          evaluated[i] += EvaluationsOf(next.rule);
          if (next.order.tasks.empty()) continue;
          std::swap(at, next);
          if (found[i].order.tasks.empty() ||
              at.order.makespan_ns < found[i].order.makespan_ns) {
            found[i] = at;
          }
        }
      });
      // A climb goes on from where the best of its jobs that moved ended.
      std::vector<Candidate*> next(climbs.size(), nullptr);
      for (int i = 0; i < jobs; ++i) {
        evaluations_ += evaluated[i];
        if (ends[i].order.tasks.empty()) continue;
        Candidate*& best = next[climb_of(i)];
        if (best == nullptr ||
            ends[i].order.makespan_ns <= best->order.makespan_ns) {
          best = &ends[i];
        }
        Offer(std::move(found[i]));
      }
      for (size_t i = 0; i < climbs.size(); ++i) {
        if (next[i] != nullptr) climbs[i] = std::move(*next[i]);
      }
    }
  }

  // A schedule, and how it is improved.
  struct Walk {
    TaskOrder best;
    bool rebuilds = false;  // schedules built anew; else moves
    double hottest = 0;     // 0: downhill
    // Made by the first round.
    std::unique_ptr<OrderSearch> orders = nullptr;
    std::unique_ptr<RebuildSearch> rebuilt = nullptr;
  };

  bool IsTiny() const { return graph_.pairs <= kTinyPairs; }

  void Load(Walk& walk) {
    if (walk.rebuilds) {
      if (walk.rebuilt == nullptr) {
        walk.rebuilt =
            std::make_unique<RebuildSearch>(forward_.model(), forward_.rules());
      }
      walk.rebuilt->Load(walk.best, &stop_);
      return;
    }
    if (walk.orders == nullptr) {
      walk.orders = std::make_unique<OrderSearch>(graph_);
    }
    walk.orders->Load(walk.best);
    walk.orders->SpeedUpWhereMemoryAllows(&stop_);
    walk.orders->FuseWhereSlack();
  }

  // Of the best, what walks begin with, where the budget is for rules alone.
  void Polish() {
    TaskOrder& best = elites_.front().order;
    Walk walk{.best = best};
    Load(walk);
    if (walk.orders->makespan_ns() < best.makespan_ns) walk.orders->Save(best);
  }

  // A round of the first `walking` of `walks` side by side, each of so many
  // moves. `walked`: 0 when walks are as hot as ever, 1 when they are as cold.
  // Threads go by turns, always to the walk that has had the fewest, so that
  // all threads are busy though walks are few.
  void GoOn(std::vector<Walk>& walks, int walking, int64_t moves,
            double walked) {
    struct Turns {
      int64_t had = 0;
      bool taken = false;
    };
    const int64_t most = moves < kMovesPerRound ? 1 : kTurnsPerRound;
    Mutex mutex;
    std::vector<Turns> turns(walking);
    std::vector<int64_t> made(walking * most, 0);
    // The walk whose turn is next; none when all are done or taken, and then
    // those that took them go on.
    const auto next_walk = [&]() -> int {
      int next = -1;
      for (int i = 0; i < walking; ++i) {
        if (turns[i].taken || turns[i].had == most) continue;
        if (next < 0 || turns[i].had < turns[next].had) next = i;
      }
      return next;
    };
    pool_.Run(std::min(walking, pool_.threads()), [&](int worker, int) {
      MutexLock lock(&mutex);
      for (int i = next_walk(); i >= 0 && !Stopped(); i = next_walk()) {
        turns[i].taken = true;
        mutex.Unlock();
        const int64_t number = turns[i].had * walking + i;
        made[number] =
            Go(walks[i], worker, moves / most, turns_begun_ + number, walked);
        mutex.Lock();
        turns[i].taken = false;
        ++turns[i].had;
      }
    });
    turns_begun_ += made.size();
    for (const int64_t moves_made : made) {
      evaluations_ += std::max<int64_t>(1, moves_made / kMovesPerEvaluation);
    }
  }

  // Returns the moves made, of `moves` at most; `number`: that no other turn
  // has.
  int64_t Go(Walk& walk, int worker, int64_t moves, uint64_t number,
             double walked) {
    if (walk.orders == nullptr && walk.rebuilt == nullptr) Load(walk);
    WalkOptions options;
    options.moves = moves;
    options.seed = options_.seed * 0x9e3779b97f4a7c15u + number;
    options.stop_at_ns = bound_ns_;
    options.stop = &stop_;
    if (walk.hottest > 0) {
      options.temperature =
          walk.hottest * std::pow(kColdest / walk.hottest, walked);
    }
    return walk.rebuilds ? walk.rebuilt->Walk(
                               options, forward_.scheduler(worker), walk.best)
                         : walk.orders->Anneal(options, walk.best);
  }

  // Short walks from where every climb stands: how good the order of a rule is
  // says little about how good it becomes. What they find joins the elites.
  void Probe(std::vector<Candidate> climbs) {
    for (const Candidate& elite : elites_) {
      if (std::none_of(
              climbs.begin(), climbs.end(), [&elite](const Candidate& climb) {
                return climb.order.makespan_ns == elite.order.makespan_ns;
              })) {
        climbs.push_back(elite);
      }
    }
    const int count = static_cast<int>(climbs.size());
    const double first = Progress(), until = first + (1 - first) * kProbeShare;
    const double moves =
        (until - first) * ExpectedEvaluations() * kMovesPerEvaluation;
    if (IsTiny() || moves < kMovesPerRound * count) return;
    std::vector<Walk> walks;
    walks.reserve(climbs.size());
    for (Candidate& climb : climbs) {
      walks.push_back({.best = std::move(climb.order),
                       .rebuilds = true,
                       .hottest = kHottest});
    }
    const auto at_bound = [this](const Walk& walk) {
      return walk.best.makespan_ns <= bound_ns_;
    };
    for (double at = first;
         at < until && std::none_of(walks.begin(), walks.end(), at_bound);
         at = Progress()) {
      GoOn(walks, count, kMovesPerRound,
           (at - first) / (until - first) * kProbeCooling);
    }
    for (int i = 0; i < count; ++i) {
      climbs[i].order = std::move(walks[i].best);
      Offer(std::move(climbs[i]));
    }
  }

  // Probes from `climbs`, then walks from the elites side by side: the first
  // downhill, the others by rebuilding; all of a tiny problem's by moves,
  // hotter and hotter.
  void WalkOn(std::vector<Candidate> climbs) {
    if (Progress() >= 1) {
      if (!Stopped()) Polish();
      return;
    }
    Probe(std::move(climbs));
    while (elites_.size() < kElites) elites_.push_back(elites_.front());
    std::vector<Walk> walks;
    for (int i = 0; i < kElites; ++i) {
      const bool rebuilds = i > 0 && !IsTiny();
      walks.push_back(
          {.best = elites_[i].order,
           .rebuilds = rebuilds,
           .hottest = rebuilds ? kHottest : kTinyHottest * i / (kElites - 1)});
    }
    const double first_progress = Progress();
    double next_exchange = 0;
    while (true) {
      const double progress = Progress();
      if (progress >= 1) return;
      // 0 at the start of the walks, 1 at the end of the budget.
      const double walked = (progress - first_progress) / (1 - first_progress);
      int walking =
          static_cast<int>(std::min<int64_t>(kElites, EvaluationsLeft()));
      if (walks[walking - 1].rebuilds &&
          EvaluationsLeft() / walking * kMovesPerEvaluation <
              RebuildSearch::kMovesPerRebuild) {
        walking = 1;
      }
      GoOn(walks, walking,
           std::min(IsTiny() ? kTinyMovesPerRound : kMovesPerRound,
                    EvaluationsLeft() / walking * kMovesPerEvaluation),
           walked);
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
        walks[worst].best = walks[best].best;
        Load(walks[worst]);
      }
    }
  }

  const ProblemGraph& graph_;
  const SearchOptions& options_;
  std::optional<WorkerPool> own_pool_;
  WorkerPool& pool_;
  Direction forward_;
  bool reversal_tried_ = false;
  std::unique_ptr<ReversedDirection> reversed_;  // may be null
  const int64_t bound_ns_;
  const Clock::time_point start_;
  std::function<bool()> stop_;
  std::vector<Candidate> elites_;  // best first
  int64_t evaluations_ = 0;
  uint64_t turns_begun_ = 0;  // turns of all walks
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
