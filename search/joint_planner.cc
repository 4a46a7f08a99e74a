#include "search/joint_planner.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>

#include "search/move_checker.h"
#include "search/partition/layout_planner.h"
#include "search/strategy/strategy.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

using WallClock = std::chrono::steady_clock;

// Of the budget, for a first plan of every replica.
constexpr double kFirstShare = 0.5;
// Pieces without gain after which the slowest replica is left as it is.
constexpr int kMostFruitless = 3;

// Hands out a budget piece by piece.
class BudgetPieces {
 public:
  explicit BudgetPieces(const SearchBudget& whole)
      : whole_(whole), start_(WallClock::now()) {
    PW_CHECK(whole.evaluations > 0 || whole.deadline.has_value());
  }

  bool left() const {
    if (whole_.cancelled != nullptr && whole_.cancelled->load()) return false;
    if (whole_.evaluations > 0 && used_ >= whole_.evaluations) return false;
    return !whole_.deadline || WallClock::now() < *whole_.deadline;
  }

  // `share` of the whole, as far as it is there.
  SearchBudget Piece(double share) const {
    SearchBudget piece = whole_;
    if (whole_.evaluations > 0) {
      piece.evaluations = std::clamp<int64_t>(
          static_cast<int64_t>(share * static_cast<double>(whole_.evaluations)),
          1, std::max<int64_t>(1, whole_.evaluations - used_));
    } else {
      const std::chrono::duration<double> time =
          share * std::chrono::duration<double>(*whole_.deadline - start_);
      piece.deadline =
          std::min(*whole_.deadline,
                   WallClock::now() +
                       std::chrono::duration_cast<WallClock::duration>(time));
    }
    return piece;
  }

  void Use(int64_t evaluations) { used_ += std::max<int64_t>(1, evaluations); }

 private:
  const SearchBudget whole_;
  const WallClock::time_point start_;
  int64_t used_ = 0;
};

// A microbatch and its work.
struct Load {
  MicrobatchOrigin origin;
  double ns = 0;  // many microbatches' sum could pass int64
};

// By replica and microbatch.
absl::StatusOr<std::vector<Load>> LoadsOf(
    const semu::Job& job, absl::Span<const semu::Batch* const> batches,
    const semu::CostModel& costs) {
  std::vector<Load> loads;
  for (size_t r = 0; r < batches.size(); ++r) {
    const auto& microbatches = batches[r]->microbatches;
    for (size_t b = 0; b < microbatches.size(); ++b) {
      Load& load = loads.emplace_back();
      load.origin = {static_cast<int>(r), static_cast<int>(b)};
      semu::Batch alone;
      alone.microbatches = {microbatches[b]};
      PW_ASSIGN_OR_RETURN(const LayerTimes times,
                          MeanLayerTimes(job, alone, costs));
      for (const std::vector<int64_t>& module : times) {
        load.ns = std::accumulate(module.begin(), module.end(), load.ns);
      }
    }
  }
  return loads;
}

// `loads` as LoadsOf puts them: heaviest first, to the replica with the least
// work that has a place.
MicrobatchMoves DealHeaviestFirst(absl::Span<const semu::Batch* const> batches,
                                  std::vector<Load> loads) {
  std::stable_sort(loads.begin(), loads.end(),
                   [](const Load& a, const Load& b) { return a.ns > b.ns; });
  MicrobatchMoves moves(batches.size());
  std::vector<double> work_ns(batches.size(), 0);
  for (const Load& load : loads) {
    int to = -1;
    for (size_t r = 0; r < batches.size(); ++r) {
      if (moves[r].size() < batches[r]->microbatches.size() &&
          (to < 0 || work_ns[r] < work_ns[to])) {
        to = static_cast<int>(r);
      }
    }
    moves[to].push_back(load.origin);
    work_ns[to] += load.ns;
  }
  for (std::vector<MicrobatchOrigin>& replica : moves) {
    std::sort(replica.begin(), replica.end(),
              [](const MicrobatchOrigin& a, const MicrobatchOrigin& b) {
                return std::pair(a.replica, a.microbatch) <
                       std::pair(b.replica, b.microbatch);
              });
  }
  return moves;
}

// Of the replica with the most.
double MostWork(absl::Span<const semu::Batch* const> batches,
                const MicrobatchMoves& moves, const std::vector<Load>& loads) {
  std::vector<size_t> first(batches.size(), 0);
  for (size_t r = 1; r < batches.size(); ++r) {
    first[r] = first[r - 1] + batches[r - 1]->microbatches.size();
  }
  double most_ns = 0;
  for (const std::vector<MicrobatchOrigin>& replica : moves) {
    double work_ns = 0;
    for (const MicrobatchOrigin& origin : replica) {
      work_ns += loads[first[origin.replica] + origin.microbatch].ns;
    }
    most_ns = std::max(most_ns, work_ns);
  }
  return most_ns;
}

}  // namespace

std::vector<absl::StatusOr<StepPlan>> PlanJointly(
    const StepPlanner& planner, const PlannableJob& job,
    absl::Span<const semu::Batch* const> batches, const PlanOptions& options) {
  PW_CHECK(options.strategy.empty() && options.jitter.duration_noise == 0);
  const int replicas = static_cast<int>(batches.size());
  BudgetPieces budget(options.search.budget);
  std::vector<absl::StatusOr<StepPlan>> plans;
  const double equal_share = kFirstShare / replicas;
  const std::atomic<bool>* cancelled = options.search.budget.cancelled;
  const auto ended = [cancelled] {
    return cancelled != nullptr && cancelled->load();
  };
  for (const semu::Batch* batch : batches) {
    if (ended()) {
      plans.push_back(absl::CancelledError("not planned: cancelled"));
      continue;
    }
    PlanOptions first = options;
    first.search.budget = budget.Piece(equal_share);
    plans.push_back(planner.Plan(job, *batch, first));
    if (plans.back().ok()) budget.Use(plans.back()->report.evaluations);
  }
  std::vector<double> share(replicas, equal_share);
  std::vector<int> fruitless(replicas, 0);
  while (budget.left() && !ended()) {
    int slowest = -1;
    for (int r = 0; r < replicas; ++r) {
      if (plans[r].ok() &&
          (slowest < 0 ||
           plans[r]->report.makespan_ns > plans[slowest]->report.makespan_ns)) {
        slowest = r;
      }
    }
    // Nothing else shortens the step.
    if (slowest < 0 || fruitless[slowest] >= kMostFruitless) break;
    StepPlan& plan = *plans[slowest];
    if (plan.report.schedule_makespan_ns <= plan.report.lower_bound_ns) break;
    share[slowest] *= 2;
    PlanOptions more = options;
    more.search.budget = budget.Piece(share[slowest]);
    more.search.warm_start = &plan.schedule;
    more.search.warm_settings = plan.settings;
    absl::StatusOr<StepPlan> better =
        planner.Plan(job, *batches[slowest], more);
    budget.Use(better.ok() ? better->report.evaluations : 1);
    if (!better.ok() || better->report.makespan_ns >= plan.report.makespan_ns) {
      ++fruitless[slowest];
      continue;
    }
    fruitless[slowest] = 0;
    better->report.evaluations += plan.report.evaluations;
    better->report.search_ns += plan.report.search_ns;
    plan = *std::move(better);
  }
  return plans;
}

absl::StatusOr<MicrobatchMoves> EvenOutReplicas(
    const semu::Job& job, absl::Span<const semu::Batch* const> batches,
    const semu::CostModel& costs) {
  PW_ASSIGN_OR_RETURN(std::vector<Load> loads, LoadsOf(job, batches, costs));
  return DealHeaviestFirst(batches, std::move(loads));
}

std::vector<semu::Batch> ApplyMoves(
    absl::Span<const semu::Batch* const> batches,
    const MicrobatchMoves& moves) {
  std::vector<semu::Batch> moved(moves.size());
  for (size_t r = 0; r < moves.size(); ++r) {
    moved[r].forward_only = batches[r]->forward_only;
    for (const MicrobatchOrigin& origin : moves[r]) {
      moved[r].microbatches.push_back(
          batches[origin.replica]->microbatches[origin.microbatch]);
    }
  }
  return moved;
}

absl::StatusOr<std::optional<DealtBatches>> DealOut(
    const PlannableJob& job, absl::Span<const semu::Batch* const> batches) {
  MicrobatchMoves unmoved(batches.size());
  for (size_t r = 0; r < batches.size(); ++r) {
    if (batches[r]->forward_only != batches[0]->forward_only) {
      return std::nullopt;
    }
    for (size_t b = 0; b < batches[r]->microbatches.size(); ++b) {
      unmoved[r].push_back({static_cast<int>(r), static_cast<int>(b)});
    }
  }
  PW_ASSIGN_OR_RETURN(const std::vector<Load> loads,
                      LoadsOf(job.job, batches, *job.costs));
  DealtBatches dealt;
  dealt.moves = DealHeaviestFirst(batches, loads);
  if (MostWork(batches, dealt.moves, loads) >=
      MostWork(batches, unmoved, loads)) {
    return std::nullopt;
  }
  dealt.batches = ApplyMoves(batches, dealt.moves);
  PW_RETURN_IF_ERROR(CheckMoves(batches, dealt.moves, dealt.batches));
  return dealt;
}

}  // namespace pipeweaver::search
