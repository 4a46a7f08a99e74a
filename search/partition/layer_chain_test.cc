// Static orders are free of deadlock, as long and as full as is known.

#include "search/partition/layer_chain.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/plan/plan_checker.h"
#include "search/problem/problem.h"

namespace pipeweaver::search {
namespace {

struct Lengths {
  int forward = 1;
  int input_grad = 1;
  int weight_grad = 1;
};

bool Splits(ChainRule rule) {
  return rule == ChainRule::kZeroBubbleH1 || rule == ChainRule::kZeroBubbleV;
}

// The chain as a problem: equal stages, one sweep a virtual stage.
Problem PlainChain(ChainRule rule, int ranks, int microbatches,
                   int virtual_stages, const Lengths& lengths) {
  Problem problem;
  problem.ranks = ranks;
  problem.split_backward = Splits(rule);
  problem.memory_limit_bytes.assign(ranks, 1000);
  for (int b = 0; b < microbatches; ++b) {
    for (int v = 0; v < virtual_stages; ++v) {
      Sweep& sweep = problem.sweeps.emplace_back();
      sweep.id = std::to_string(b) + "/" + std::to_string(v);
      sweep.microbatch = b;
      if (v > 0) sweep.after = {static_cast<int>(problem.sweeps.size()) - 2};
      Choice choice;
      choice.forward_ns = lengths.forward;
      choice.input_grad_ns = lengths.input_grad;
      choice.weight_grad_ns = lengths.weight_grad;
      choice.activation_bytes = choice.backward_bytes = 1;
      choice.weight_grad_bytes = 1;
      const bool down = rule == ChainRule::kZeroBubbleV && v == 1;
      for (int r = 0; r < ranks; ++r) {
        sweep.stages.push_back({down ? ranks - 1 - r : r, 0, {choice}});
      }
    }
  }
  return problem;
}

Schedule PlainSchedule(ChainRule rule, int ranks, int microbatches,
                       int virtual_stages) {
  Schedule schedule;
  for (int r = 0; r < ranks; ++r) {
    std::vector<ScheduledStage>& out = schedule.ranks.emplace_back();
    for (const ChainTurn& turn :
         ChainOrder(rule, ranks, r, microbatches, virtual_stages)) {
      EXPECT_LT(turn.microbatch, microbatches);
      const int sweep = turn.microbatch * virtual_stages + turn.virtual_stage;
      const bool down =
          rule == ChainRule::kZeroBubbleV && turn.virtual_stage == 1;
      out.push_back({turn.kind, sweep, down ? ranks - 1 - r : r, 0});
    }
  }
  return schedule;
}

CheckedSchedule Check(ChainRule rule, int ranks, int microbatches,
                      int virtual_stages, const Lengths& lengths) {
  const auto checked = CheckSchedule(
      PlainChain(rule, ranks, microbatches, virtual_stages, lengths),
      PlainSchedule(rule, ranks, microbatches, virtual_stages));
  EXPECT_TRUE(checked.ok())
      << ranks << " ranks, " << microbatches << " microbatches, "
      << virtual_stages << " stages: " << checked.status();
  return checked.ok() ? *checked : CheckedSchedule();
}

TEST(FilledMicrobatchesTest, AreWholeGroupsOrWhatAVNeeds) {
  EXPECT_EQ(FilledMicrobatches(ChainRule::k1f1b, 4, 5, 1), 5);
  EXPECT_EQ(FilledMicrobatches(ChainRule::k1f1b, 4, 5, 2), 8);
  EXPECT_EQ(FilledMicrobatches(ChainRule::k1f1b, 4, 8, 2), 8);
  EXPECT_EQ(FilledMicrobatches(ChainRule::kZeroBubbleV, 4, 5, 2), 7);
  EXPECT_EQ(FilledMicrobatches(ChainRule::kZeroBubbleV, 4, 9, 2), 9);
}

TEST(ChainOrderTest, OneForwardOneBackwardHasItsKnownLength) {
  for (int ranks = 1; ranks <= 6; ++ranks) {
    for (int microbatches = 1; microbatches <= 14; ++microbatches) {
      for (int stages = 1; stages <= 4; ++stages) {
        const CheckedSchedule checked =
            Check(ChainRule::k1f1b, ranks, microbatches, stages, {});
        if (microbatches % ranks != 0) continue;
        // All work of a rank, and a bubble of (ranks - 1) * (F + B) shortened
        // by interleaving.
        EXPECT_EQ(checked.times.makespan_ns,
                  3 * (microbatches * stages + ranks - 1));
      }
    }
  }
}

TEST(ChainOrderTest, OneForwardOneBackwardHoldsTheWarmUp) {
  EXPECT_THAT(Check(ChainRule::k1f1b, 4, 16, 1, {}).peak_bytes,
              ::testing::ElementsAre(4, 3, 2, 1));
}

TEST(ChainOrderTest, GpipeHasItsKnownLengthAndHoldsEverything) {
  for (int ranks = 1; ranks <= 6; ++ranks) {
    for (int microbatches = 1; microbatches <= 14; ++microbatches) {
      const CheckedSchedule checked =
          Check(ChainRule::kGpipe, ranks, microbatches, 1, {3, 4, 1});
      EXPECT_EQ(checked.times.makespan_ns, (microbatches + ranks - 1) * 8);
      EXPECT_THAT(checked.peak_bytes, ::testing::Each(microbatches));
    }
  }
}

TEST(ChainOrderTest, ZeroBubbleH1HasItsKnownLengthWithin1f1bMemory) {
  for (int ranks = 1; ranks <= 6; ++ranks) {
    for (int microbatches = 1; microbatches <= 14; ++microbatches) {
      for (const Lengths& lengths : {Lengths{1, 1, 1}, Lengths{3, 3, 2}}) {
        const CheckedSchedule checked =
            Check(ChainRule::kZeroBubbleH1, ranks, microbatches, 1, lengths);
        if (microbatches < 2 * ranks) continue;
        // A bubble of (ranks - 1) * (F + I - W).
        EXPECT_EQ(checked.times.makespan_ns,
                  microbatches * (lengths.forward + lengths.input_grad +
                                  lengths.weight_grad) +
                      (ranks - 1) * (lengths.forward + lengths.input_grad -
                                     lengths.weight_grad));
        EXPECT_THAT(checked.peak_bytes, ::testing::Each(::testing::Le(ranks)));
      }
    }
  }
}

TEST(ChainOrderTest, ZeroBubbleVHasNoBubbleBehindItsStart) {
  for (int ranks = 1; ranks <= 6; ++ranks) {
    for (int microbatches = 1; microbatches <= 14; ++microbatches) {
      const CheckedSchedule checked =
          Check(ChainRule::kZeroBubbleV, ranks, microbatches, 2, {});
      if (microbatches < 2 * ranks) continue;
      EXPECT_EQ(checked.times.makespan_ns, 6 * microbatches + ranks - 1);
      // Half a stage each: the memory of 1F1B's first rank.
      EXPECT_THAT(checked.peak_bytes,
                  ::testing::Each(::testing::Le(2 * ranks)));
    }
  }
}

}  // namespace
}  // namespace pipeweaver::search
