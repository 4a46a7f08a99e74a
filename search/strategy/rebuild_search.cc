// Local search by rebuilding; see rebuild_search.h.

#include "search/strategy/rebuild_search.h"

#include <cmath>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_search.h"
#include "search/strategy/pipeline_rule.h"

namespace pipeweaver::search {
namespace {

// A shift is at most the first share of the makespan, every other one at most
// the second.
constexpr double kFarthestShift = 0.3;
constexpr double kNearShift = 0.09;
constexpr double kTwoShifts = 0.2;
// Orders longer than the present one by more than the first are not worth the
// second schedule, those by more than the second are not worth a descent.
constexpr double kWorth = 1.02;
constexpr double kWorthDescent = 1.001;
// ListRule::patience is 0, once or twice this.
constexpr int kPatience = 64;

}  // namespace

RebuildSearch::RebuildSearch(const ListModel& model, const PipelineRules& rules)
    : rules_(rules), orders_(model.graph()), times_(model.graph()) {
  pairs_of_group_.resize(rules.groups());
  for (int p = 0; p < model.graph().pairs; ++p) {
    pairs_of_group_[rules.group_of_pair(p)].push_back(p);
  }
}

void RebuildSearch::Load(const TaskOrder& order,
                         const std::function<bool()>* stop) {
  orders_.Load(order);
  orders_.SpeedUpWhereMemoryAllows(stop);
  orders_.FuseWhereSlack();
  orders_.Save(current_);
  Adopt();
}

void RebuildSearch::Adopt() {
  times_.Earliest(current_, earliest_ns_);
  times_.Latest(current_, latest_ns_);
}

void RebuildSearch::ShiftGroup() {
  const std::vector<int32_t>& pairs =
      pairs_of_group_[RandomBelow(static_cast<int>(pairs_of_group_.size()))];
  const auto part = static_cast<Part>(RandomBelow(4));
  const auto makespan_ns = static_cast<double>(current_.makespan_ns);
  const double farthest = RandomBelow(2) == 0 ? kFarthestShift : kNearShift;
  const auto shift_ns =
      static_cast<int64_t>((2 * Random() - 1) * farthest * makespan_ns);
  const auto then_ns = static_cast<int64_t>(Random() * makespan_ns);
  for (const int32_t pair : pairs) {
    for (const int kind : {kForwardTask, kGradientTask, kWeightTask}) {
      const Task task = 3 * pair + kind;
      if ((part == Part::kForwards && kind != kForwardTask) ||
          (part == Part::kBackwards && kind == kForwardTask) ||
          (part == Part::kFromThenOn && earliest_ns_[task] < then_ns)) {
        continue;
      }
      list_.key[task] += shift_ns;
    }
  }
}

int64_t RebuildSearch::Walk(const WalkOptions& options,
                            ListScheduler& scheduler, TaskOrder& best) {
  random_.seed(options.seed);
  if (current_.makespan_ns < best.makespan_ns) best = current_;
  int64_t made = 0;
  while (made + kMovesPerRebuild <= options.moves &&
         best.makespan_ns > options.stop_at_ns &&
         (options.stop == nullptr || !(*options.stop)())) {
    const auto makespan_ns = static_cast<double>(current_.makespan_ns);
    list_.key = RandomBelow(2) == 0 ? earliest_ns_ : latest_ns_;
    ShiftGroup();
    if (Random() < kTwoShifts) ShiftGroup();
    list_.patience = RandomBelow(3) * kPatience;
    rules_.HoldBack(latest_ns_, list_);
    scheduler.Run(list_, current_.ways, next_,
                  static_cast<int64_t>(makespan_ns * kWorth));
    made += kMovesPerSchedule;
    if (next_.tasks.empty()) continue;
    times_.Latest(next_, list_.key);
    rules_.HoldBack(list_.key, list_);
    scheduler.Run(list_, next_.ways, again_, next_.makespan_ns);
    made += kMovesPerSchedule;
    if (!again_.tasks.empty()) std::swap(next_, again_);
    if (static_cast<double>(next_.makespan_ns) > makespan_ns * kWorthDescent) {
      continue;
    }
    orders_.Load(next_);
    orders_.SpeedUpWhereMemoryAllows(options.stop);
    WalkOptions descent = options;
    descent.moves = kMovesPerDescent;
    descent.temperature = 0;
    descent.seed = random_();
    made += orders_.Anneal(descent, next_);
    const double over_ns = static_cast<double>(next_.makespan_ns) - makespan_ns;
    if (over_ns > 0 && (options.temperature <= 0 ||
                        Random() >= std::exp(-over_ns / (options.temperature *
                                                         makespan_ns)))) {
      continue;
    }
    std::swap(current_, next_);
    Adopt();
    if (current_.makespan_ns < best.makespan_ns) best = current_;
  }
  return made;
}

}  // namespace pipeweaver::search
