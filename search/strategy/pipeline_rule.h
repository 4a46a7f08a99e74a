// List rules for pipelines from a handful of numbers: in which order groups of
// sweeps enter, how forwards and backwards alternate, what memory costs, where
// backwards are fused. The space that coarse search moves in.
//
// A group is a component of sweeps (safe_plan.h) with the sweeps without a
// backward that feed it: mostly a microbatch.

#ifndef SEARCH_STRATEGY_PIPELINE_RULE_H_
#define SEARCH_STRATEGY_PIPELINE_RULE_H_

#include <algorithm>
#include <cstdint>
#include <optional>
#include <random>
#include <vector>

#include "absl/types/span.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/memory_ways.h"
#include "search/strategy/order_times.h"
#include "search/strategy/safe_plan.h"

namespace pipeweaver::search {

struct PipelineRule {
  enum class Rhythm : uint8_t {
    kBackwardFirst,  // a backward runs before any forward
    kLag,            // a backward before forwards of groups `lag` behind it
    kForwardFirst,   // by group, a group's backwards after all forwards
    kPaced,          // by due time (SetDueTimes)
    kZeroBubbleV,    // the closed form for two sweeps there and back
  };
  // What the order of groups was made from; they are moved one by one since.
  enum class GroupOrder : uint8_t {
    kAsGiven,
    kHill,
    kRising,
    kLateHill,
    kSteepHill
  };
  // Which of a group's sweeps goes first on a rank.
  enum class SweepOrder : uint8_t { kAsGiven, kDeepFirst, kShallowFirst };

  std::vector<int32_t> groups;  // in the order in which they enter
  GroupOrder group_order = GroupOrder::kAsGiven;
  Rhythm rhythm = Rhythm::kBackwardFirst;
  int lag = 0;
  int stretch = 0;  // kPaced: of a group's own times, in quarters
  SweepOrder sweep_order = SweepOrder::kAsGiven;
  bool by_hold = true;         // the price of memory is by time, too
  std::vector<uint8_t> price;  // [rank]: index into the prices of memory
  int patience = 0;            // ListRule::patience
  int split_groups = 0;        // the last groups never fuse their backwards
  int reserve = 0;             // of weight gradients, in mean lengths
  // Groups open at a time, in quarters of a mean group's work; 0: any number.
  int open = 0;
  // Forwards are held back also where memory only costs much (MemoryIsScarce).
  // Not so in rules for a first look: layouts are compared by these, and better
  // without.
  bool holds_back = false;
  // Scheduled once more (BuildAgain). Not read by Build.
  bool twice = false;
};

// What a problem's rules are made from. Immutable; thread-safe.
class PipelineRules {
 public:
  explicit PipelineRules(const ListModel& model);

  int groups() const { return static_cast<int>(group_work_ns_.size()); }
  int group_of_pair(int pair) const {
    return group_of_sweep_[graph_.pair_sweep[pair]];
  }
  int prices() const {
    return static_cast<int>(
        std::max(ladders_[0].prices.size(), ladders_[1].prices.size()));
  }

  // The plain list schedule (backwards first, sweeps and groups as given, held
  // back where time does not buy memory), and the rules to look at next to it,
  // groups as given.
  std::vector<PipelineRule> FirstRules() const;

  // Rules with other orders of groups than as given, some for each order,
  // `best` and others beside it; none where all groups are alike.
  std::vector<std::vector<PipelineRule>> OtherOrders(
      const PipelineRule& best) const;

  // A rule as numbers that fit other problems like this one: all of it but how
  // single groups were moved; and back. None where the numbers make no rule.
  static std::vector<int32_t> ToSettings(const PipelineRule& rule);
  std::optional<PipelineRule> FromSettings(
      const std::vector<int32_t>& settings) const;

  // All that decides the order: rules with equal keys give the same.
  static std::vector<int32_t> KeyOf(const PipelineRule& rule);

  // What a rule is made of, in the order in which to vary it.
  enum class Part : uint8_t {
    kRhythm,
    kOpen,
    kPrice,
    kReserve,
    kSplit,
    kPatience
  };
  static constexpr Part kParts[] = {Part::kRhythm, Part::kOpen,
                                    Part::kPrice,  Part::kReserve,
                                    Part::kSplit,  Part::kPatience};
  // Those that most of the makespan depends on.
  static constexpr Part kMainParts[] = {Part::kRhythm, Part::kOpen,
                                        Part::kPrice};

  // All variations of one part of `rule`, held back; may be none.
  std::vector<PipelineRule> Variations(const PipelineRule& rule,
                                       Part part) const;

  // `rule` with a random change of order or numbers, held back, to be scheduled
  // twice.
  PipelineRule Mutate(const PipelineRule& rule, std::mt19937_64& random) const;

  // The order of groups of a schedule of this problem or one like it: by where
  // sweeps of the same number first appear.
  std::vector<int32_t> GroupOrderOf(const Schedule& schedule) const;

  void Build(const PipelineRule& rule, ListRule& list, Ways& ways) const;

  // For a second schedule by `rule`, whose first is `order`: by the latest
  // start times of that. Where memory is scarce, forwards are held back to
  // about these, and it is priced by how long `order` holds it. `times`: a
  // workspace.
  void BuildAgain(const PipelineRule& rule, const TaskOrder& order,
                  OrderTimes& times, ListRule& list, Ways& ways) const;

  // Whether memory is scarce by `rule`, so that forwards are held back: it
  // costs much time and the rule holds back, or time does not buy any and a
  // rank's activations do not fit at once. Not so in kZeroBubbleV's first
  // schedule, which is of a fixed form.
  bool MemoryIsScarce(const PipelineRule& rule) const;

  // Holds back all F of `list` to somewhat before `start_ns`, [task]: less than
  // a group's passage through the pipeline.
  void HoldBack(absl::Span<const int64_t> start_ns, ListRule& list) const;

  // Chooses anew how pairs of `ways`, a complete schedule's, run at the prices
  // of `rule`: what a pair's memory weighs goes in part by `hold_ns`, how long
  // it was held, [pair]. Pairs stay fused or not as they are: one without a B
  // in one piece keeps its choice where the new one has none.
  void Reprice(const PipelineRule& rule, absl::Span<const int64_t> hold_ns,
               Ways& ways) const;

 private:
  std::vector<int32_t> Groups(PipelineRule::GroupOrder order) const;
  // `rule` in all rhythms worth a first look.
  void AddRhythms(PipelineRule rule, std::vector<PipelineRule>& rules) const;
  // Moves the group at `place` to the other side of the largest, between its
  // neighbours by size. REQUIRES: it is not the largest.
  void ChangeSides(int place, std::vector<int32_t>& order) const;
  // The first of several.
  int PlaceOfLargest(const std::vector<int32_t>& order) const;
  void FindGroups(const SafePlan& plan);
  void FindPrices(const ListModel& model, bool by_hold);
  void FindScarcity();
  void FindAloneTimes();
  void FindV();
  // ns per byte, before the pair's weight: that of its rank, or the least at
  // which its component fits.
  double PriceOf(const PipelineRule& rule, int pair) const;
  // Of forwards and gradients; [task].
  void SetDueTimes(const PipelineRule& rule, std::vector<int64_t>& key) const;
  void BuildZeroBubbleV(const std::vector<int32_t>& place,
                        ListRule& list) const;

  const ProblemGraph& graph_;
  std::vector<int32_t> group_of_sweep_;
  std::vector<int64_t> group_work_ns_;
  std::vector<int32_t> depth_;  // [sweep]: sweeps before it, longest chain
  struct PriceLadder {
    std::vector<double> weights;  // [pair]
    std::vector<double> prices;   // ns per byte, before weights
    // [pair]: the least price at which its component fits alone on its rank.
    std::vector<uint8_t> least;
  };
  PriceLadder ladders_[2];  // [by_hold]
  const MemoryPrices memory_;
  bool can_fuse_ = false;
  bool is_v_ = false;
  bool is_scarce_ = false;  // memory, which time does not buy
  int64_t mean_weight_grad_ns_ = 0;
  int64_t mean_component_work_ns_ = 0;
  // Work of a group on each rank that it stands on, by group.
  struct RankWork {
    int32_t rank;
    int64_t ns;
  };
  std::vector<RankWork> group_work_;
  std::vector<int32_t> group_work_begin_;  // [group], and the total at the end
  // When tasks start if their group has all ranks to itself, [task]; and how
  // long before its time a forward may run (HoldBack).
  std::vector<int64_t> alone_ns_;
  int64_t ahead_ns_ = 0;
  // For kZeroBubbleV: place of each task on its rank, by
  // [(rank * 2 + chunk) * groups + group's place][kind].
  std::vector<int32_t> v_place_;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_PIPELINE_RULE_H_
