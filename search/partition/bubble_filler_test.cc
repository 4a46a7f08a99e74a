// Fillers run in the bubbles of an order that stays as it is.

#include "search/partition/bubble_filler.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/plan/plan_checker.h"
#include "search/plan/safe_order.h"
#include "search/plan/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

Stage OneStage(int rank, int64_t ns) {
  Choice choice;
  choice.forward_ns = choice.input_grad_ns = ns;
  choice.activation_bytes = choice.backward_bytes = 1;
  return {rank, 0, {choice}};
}

// Microbatches of an encoder and a backbone sweep over two ranks.
Problem TwoModules(int microbatches, int64_t encoder_ns) {
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {1000, 1000};
  for (int b = 0; b < microbatches; ++b) {
    for (const int64_t ns : {encoder_ns, int64_t{10}}) {
      Sweep& sweep = problem.sweeps.emplace_back();
      sweep.id = std::to_string(problem.sweeps.size());
      sweep.microbatch = b;
      sweep.stages = {OneStage(0, ns), OneStage(1, ns)};
    }
    problem.sweeps.back().after = {2 * b};
  }
  return problem;
}

// 1F1B of the backbone's sweeps.
Schedule BackboneOrder(int microbatches) {
  Schedule order;
  order.ranks.resize(2);
  for (int b = 0; b < microbatches; ++b) {
    const int sweep = 2 * b + 1;
    order.ranks[1].push_back({StageKind::kForward, sweep, 1, 0});
    order.ranks[1].push_back({StageKind::kBackward, sweep, 1, 0});
    order.ranks[0].push_back({StageKind::kForward, sweep, 0, 0});
    if (b > 0) {
      order.ranks[0].push_back({StageKind::kBackward, sweep - 2, 0, 0});
    }
  }
  order.ranks[0].push_back({StageKind::kBackward, 2 * microbatches - 1, 0, 0});
  return order;
}

TEST(FillBubblesTest, KeepsTheOrderAndIsValid) {
  const Problem problem = TwoModules(6, 3);
  const ProblemGraph graph = BuildProblemGraph(problem);
  const Schedule order = BackboneOrder(6);
  for (const bool backward_first : {false, true}) {
    for (const bool waits : {false, true}) {
      const auto filled =
          FillBubbles(problem, graph, order, {6, backward_first, waits});
      ASSERT_TRUE(filled.has_value());
      const auto checked = CheckSchedule(problem, *filled);
      EXPECT_TRUE(checked.ok()) << checked.status();
      for (int r = 0; r < 2; ++r) {
        std::vector<std::pair<int, StageKind>> expected, kept;
        for (const ScheduledStage& stage : order.ranks[r]) {
          expected.emplace_back(stage.sweep, stage.kind);
        }
        for (const ScheduledStage& stage : filled->ranks[r]) {
          if (stage.sweep % 2 == 1) kept.emplace_back(stage.sweep, stage.kind);
        }
        EXPECT_EQ(kept, expected);
      }
    }
  }
}

TEST(FillBubblesTest, WaitingFillersDoNotDelayTheOrder) {
  // Rank 1 is free until 10; the filler takes 20.
  Problem problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {1000, 1000};
  problem.sweeps.resize(2);
  for (Sweep& sweep : problem.sweeps) sweep.backward = false;
  problem.sweeps[0].stages = {OneStage(0, 5), OneStage(1, 5)};
  problem.sweeps[0].stages[0].transfer_ns = 5;
  problem.sweeps[1].stages = {OneStage(1, 20)};
  Schedule order;
  order.ranks = {{{StageKind::kForward, 0, 0, 0}},
                 {{StageKind::kForward, 0, 1, 0}}};
  const ProblemGraph graph = BuildProblemGraph(problem);
  for (const bool waits : {false, true}) {
    const auto filled = FillBubbles(problem, graph, order, {1, false, waits});
    ASSERT_TRUE(filled.has_value());
    ASSERT_EQ(filled->ranks[1].size(), 2);
    EXPECT_EQ(filled->ranks[1][waits ? 0 : 1].sweep, 0);
  }
}

TEST(FillBubblesTest, FewerBegunHoldLess) {
  const Problem problem = TwoModules(8, 1);
  const ProblemGraph graph = BuildProblemGraph(problem);
  std::vector<int64_t> peaks;
  for (const int begun : {2, 8}) {
    const auto filled =
        FillBubbles(problem, graph, BackboneOrder(8), {begun, false, false});
    ASSERT_TRUE(filled.has_value()) << begun;
    peaks.push_back(CheckSchedule(problem, *filled)->peak_bytes[1]);
  }
  EXPECT_LT(peaks[0], peaks[1]);
}

TEST(FillBubblesTest, NoneWhereTheOrderNeedsMoreBegun) {
  // 1F1B's first rank starts two microbatches before its first backward.
  const Problem problem = TwoModules(4, 1);
  const ProblemGraph graph = BuildProblemGraph(problem);
  EXPECT_EQ(FillBubbles(problem, graph, BackboneOrder(4), {1, false, false}),
            std::nullopt);
}

// The rule as it is written: before every stage, every rank looks at all that
// it could do next.
class SlowFiller {
 public:
  SlowFiller(const Problem& problem, const ProblemGraph& graph,
             const Schedule& order, const BubbleRule& rule)
      : problem_(problem),
        graph_(graph),
        order_(order),
        rule_(rule),
        in_order_(graph.sweeps, false),
        end_ns_{std::vector<int64_t>(graph.pairs, -1),
                std::vector<int64_t>(graph.pairs, -1)},
        free_ns_(graph.ranks, 0),
        next_(graph.ranks, 0),
        run_(graph.sweeps, 0),
        left_(graph.sweeps, 0) {
    for (const auto& rank : order.ranks) {
      for (const ScheduledStage& stage : rank) in_order_[stage.sweep] = true;
    }
    schedule_.ranks.resize(graph.ranks);
  }

  std::optional<Schedule> Run() {
    int left = 0;
    for (int p = 0; p < graph_.pairs; ++p) {
      const int stages = graph_.has_backward(p) ? 2 : 1;
      left += stages;
      if (!in_order_[graph_.pair_sweep[p]]) left_[MicrobatchOf(p)] += stages;
    }
    for (; left > 0; --left) {
      std::optional<Turn> first;
      for (int r = 0; r < graph_.ranks; ++r) {
        const std::optional<Turn> turn = NextOf(r);
        if (turn && (!first || turn->start_ns < first->start_ns)) first = turn;
      }
      if (!first) return std::nullopt;
      const int rank = graph_.pair_rank[first->pair];
      const int sweep = graph_.pair_sweep[first->pair];
      schedule_.ranks[rank].push_back(
          {first->forward ? StageKind::kForward : StageKind::kBackward, sweep,
           graph_.stage_index(first->pair), 0});
      free_ns_[rank] = first->start_ns + LengthOf(first->pair, first->forward);
      end_ns_[first->forward][first->pair] = free_ns_[rank];
      if (in_order_[sweep]) {
        ++next_[rank];
      } else {
        ++run_[MicrobatchOf(first->pair)];
        --left_[MicrobatchOf(first->pair)];
      }
    }
    return schedule_;
  }

 private:
  struct Turn {
    int64_t start_ns = 0;
    int pair = 0;
    bool forward = true;
  };

  int64_t LengthOf(int pair, bool forward) const {
    const GraphChoice& choice = graph_.choices_of(pair)[0];
    return forward ? choice.forward_ns : choice.backward_ns;
  }
  int MicrobatchOf(int pair) const {
    return problem_.sweeps[graph_.pair_sweep[pair]].microbatch;
  }

  // None where an input has not been computed.
  std::optional<int64_t> ReadyNs(int pair, bool forward) const {
    int64_t ready_ns = forward ? 0 : end_ns_[true][pair];
    if (ready_ns < 0) return std::nullopt;
    for (const GraphEdge& edge :
         forward ? graph_.producers_of(pair) : graph_.consumers_of(pair)) {
      const int64_t end_ns = end_ns_[forward][edge.pair];
      if (end_ns < 0) return std::nullopt;
      ready_ns = std::max(ready_ns, end_ns + edge.delay_ns);
    }
    return ready_ns;
  }

  bool MayRun(int microbatch) const {
    if (run_[microbatch] > 0) return true;
    int begun = 0;
    for (size_t m = 0; m < run_.size(); ++m)
      begun += run_[m] > 0 && left_[m] > 0;
    return begun < rule_.most_begun;
  }

  std::optional<Turn> NextOf(int r) const {
    std::optional<Turn> turn;
    int64_t order_ns = std::numeric_limits<int64_t>::max();
    if (next_[r] < order_.ranks[r].size()) {
      const ScheduledStage& stage = order_.ranks[r][next_[r]];
      const int pair = graph_.sweep_first_pair[stage.sweep] + stage.stage;
      const bool forward = stage.kind == StageKind::kForward;
      if (const auto ready_ns = ReadyNs(pair, forward)) {
        order_ns = std::max(free_ns_[r], *ready_ns);
        turn = {order_ns, pair, forward};
      }
    }
    std::optional<std::tuple<int64_t, bool, int, int>> best;
    for (int p = 0; p < graph_.pairs; ++p) {
      if (in_order_[graph_.pair_sweep[p]] || graph_.pair_rank[p] != r) continue;
      for (const bool forward : {true, false}) {
        if (!forward && !graph_.has_backward(p)) continue;
        if (end_ns_[forward][p] >= 0 || !MayRun(MicrobatchOf(p))) continue;
        const std::optional<int64_t> ready_ns = ReadyNs(p, forward);
        if (!ready_ns) continue;
        const int64_t start_ns = std::max(free_ns_[r], *ready_ns);
        if (start_ns >= order_ns) continue;
        if (rule_.waits && start_ns + LengthOf(p, forward) > order_ns) continue;
        const std::tuple key(start_ns, forward == rule_.backward_first,
                             MicrobatchOf(p), p);
        if (best && *best <= key) continue;
        best = key;
        turn = {start_ns, p, forward};
      }
    }
    return turn;
  }

  const Problem& problem_;
  const ProblemGraph& graph_;
  const Schedule& order_;
  const BubbleRule& rule_;
  std::vector<bool> in_order_;      // [sweep]
  std::vector<int64_t> end_ns_[2];  // [forward][pair]; -1: not run
  std::vector<int64_t> free_ns_;    // [rank]
  std::vector<size_t> next_;        // [rank], in its order
  std::vector<int> run_, left_;     // [microbatch]: fillers
  Schedule schedule_;
};

using Turns = std::vector<std::vector<std::tuple<StageKind, int, int>>>;

Turns TurnsOf(const std::optional<Schedule>& schedule) {
  Turns turns;
  if (!schedule.has_value()) return turns;
  for (const auto& rank : schedule->ranks) {
    turns.emplace_back();
    for (const ScheduledStage& stage : rank) {
      turns.back().emplace_back(stage.kind, stage.sweep, stage.stage);
    }
  }
  return turns;
}

TEST(FillBubblesTest, IsTheRuleOnRandomProblems) {
  std::mt19937_64 random(1);
  int filled = 0;
  for (int i = 0; i < 150; ++i) {
    Problem problem = testing::RandomStepProblem(random).problem;
    problem.split_backward = false;
    int microbatches = 0;
    for (Sweep& sweep : problem.sweeps) {
      microbatches = std::max(microbatches, sweep.microbatch + 1);
      for (Stage& stage : sweep.stages) {
        Choice choice = stage.choices[0];
        // Short ones, for ties.
        choice.forward_ns = testing::Uniform(random, 0, 3);
        choice.input_grad_ns = testing::Uniform(random, 0, 4);
        stage.choices = ChoiceList({choice});
      }
    }
    // Some sweeps, in an order that is free of deadlock.
    std::vector<bool> fills(problem.sweeps.size());
    for (size_t s = 0; s < fills.size(); ++s) {
      fills[s] = testing::Uniform(random, 0, 1) == 0;
    }
    Schedule order = *SafeOrder(problem);
    for (auto& rank : order.ranks) {
      std::erase_if(rank,
                    [&](const ScheduledStage& s) { return fills[s.sweep]; });
    }
    const ProblemGraph graph = BuildProblemGraph(problem);
    for (int begun = 1; begun <= microbatches; ++begun) {
      for (const bool backward_first : {false, true}) {
        for (const bool waits : {false, true}) {
          const BubbleRule rule = {begun, backward_first, waits};
          const auto fast = FillBubbles(problem, graph, order, rule);
          EXPECT_EQ(TurnsOf(fast),
                    TurnsOf(SlowFiller(problem, graph, order, rule).Run()));
          filled += fast.has_value();
        }
      }
    }
  }
  EXPECT_GT(filled, 500);
}

}  // namespace
}  // namespace pipeweaver::search
