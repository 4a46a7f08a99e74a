// Baselines are valid, within memory, and in the order they claim.

#include "search/partition/baselines.h"

#include <cstdint>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/plan/plan_checker.h"
#include "search/problem/problem_validation.h"
#include "semu/cost/roofline_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

constexpr Baseline kAll[] = {Baseline::kMegatron, Baseline::k1f1b,
                             Baseline::kInterleaved1f1b};

// The chain as a problem: one sweep a microbatch over all its chunks.
Problem PlainChain(int ranks, int microbatches, int virtual_stages) {
  Problem problem;
  problem.ranks = ranks;
  problem.memory_limit_bytes.assign(ranks, 1000);
  for (int b = 0; b < microbatches; ++b) {
    Sweep& sweep = problem.sweeps.emplace_back();
    sweep.id = std::to_string(b);
    for (int c = 0; c < ranks * virtual_stages; ++c) {
      Choice choice;
      choice.forward_ns = 1;
      choice.input_grad_ns = 2;
      choice.activation_bytes = choice.backward_bytes = 1;
      sweep.stages.push_back({c % ranks, 0, {choice}});
    }
  }
  return problem;
}

TEST(ChainOrderTest, IsValidForAnyCounts) {
  for (int ranks = 1; ranks <= 6; ++ranks) {
    for (int microbatches = 1; microbatches <= 14; ++microbatches) {
      for (int stages = 1; stages <= 4; ++stages) {
        const Problem problem = PlainChain(ranks, microbatches, stages);
        Schedule schedule;
        for (int r = 0; r < ranks; ++r) {
          std::vector<ScheduledStage>& out = schedule.ranks.emplace_back();
          for (const ChainTurn& turn :
               ChainOrder(ranks, r, microbatches, stages)) {
            if (turn.microbatch >= microbatches) continue;
            out.push_back(
                {turn.forward ? StageKind::kForward : StageKind::kBackward,
                 turn.microbatch, turn.virtual_stage * ranks + r, 0});
          }
        }
        const auto checked = CheckSchedule(problem, schedule);
        ASSERT_TRUE(checked.ok())
            << ranks << " ranks, " << microbatches << " microbatches, "
            << stages << " stages: " << checked.status();
        if (microbatches % ranks == 0) {
          // The known length: all work of a rank, and a bubble of
          // (ranks - 1) * (1 + 2) shortened by interleaving.
          EXPECT_EQ(checked->times.makespan_ns,
                    3 * (microbatches * stages + ranks - 1));
        }
      }
    }
  }
}

TEST(ChainOrderTest, HoldsAtMostTheWarmUp) {
  const Problem problem = PlainChain(4, 16, 1);
  Schedule schedule;
  for (int r = 0; r < 4; ++r) {
    std::vector<ScheduledStage>& out = schedule.ranks.emplace_back();
    for (const ChainTurn& turn : ChainOrder(4, r, 16, 1)) {
      out.push_back({turn.forward ? StageKind::kForward : StageKind::kBackward,
                     turn.microbatch, r, 0});
    }
  }
  EXPECT_THAT(CheckSchedule(problem, schedule)->peak_bytes,
              ::testing::ElementsAre(4, 3, 2, 1));
}

TEST(PlanBaselineTest, ValidOnEverySetup) {
  for (const std::string& name : semu::SetupNames()) {
    const v1::Job proto = *semu::MakeSetup(name);
    const semu::Job job = *semu::JobFromProto(proto);
    for (const int microbatches : {1, 18}) {
      v1::BatchMetadata metadata =
          *semu::SampleBatch(proto, {.seed = 5, .microbatches = microbatches});
      // One microbatch more, of text alone.
      v1::ModuleItems* text = metadata.add_microbatches()->add_items();
      text->set_module(semu::RolesOf(proto)->text);
      text->add_tokens(100);
      metadata.set_forward_only(microbatches == 1);
      if (semu::RolesOf(proto)->video >= 0) {
        metadata.mutable_microbatches()->RemoveLast();
      }
      const semu::Batch batch = *semu::BatchFromProto(metadata, job);
      for (Baseline baseline : kAll) {
        SCOPED_TRACE(absl::StrCat(name, " ", BaselineName(baseline)));
        const auto plan =
            PlanBaseline(baseline, job, batch, batch, semu::RooflineCost());
        ASSERT_TRUE(plan.ok()) << plan.status();
        EXPECT_TRUE(ValidateProblem(plan->step.problem).ok());
        const absl::Status checked =
            CheckPlan(plan->step.problem, plan->schedule, plan->times);
        EXPECT_TRUE(checked.ok()) << checked;
        EXPECT_TRUE(
            semu::LayoutFromProto(semu::LayoutToProto(plan->layout, job), job)
                .ok());
        if (baseline == Baseline::k1f1b) {
          EXPECT_EQ(plan->virtual_stages, 1);
        }
      }
    }
  }
}

TEST(PlanBaselineTest, TimeDividedBeatsParameterDivided) {
  const v1::Job proto = *semu::MakeSetup("vlm-s");
  const semu::Job job = *semu::JobFromProto(proto);
  const semu::Batch batch =
      *semu::BatchFromProto(*semu::SampleBatch(proto, {}), job);
  const auto makespan = [&](Baseline baseline) {
    return PlanBaseline(baseline, job, batch, batch, semu::RooflineCost())
        ->times.makespan_ns;
  };
  EXPECT_LT(makespan(Baseline::kInterleaved1f1b),
            makespan(Baseline::kMegatron));
  EXPECT_LE(makespan(Baseline::kInterleaved1f1b), makespan(Baseline::k1f1b));
}

TEST(PlanBaselineTest, RecomputesWhereMemoryIsShort) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  semu::Batch batch;
  std::optional<semu::MemoryStrategy> last;
  for (const int gib : {75, 48, 36, 28, 20}) {
    proto.set_memory_budget_bytes(int64_t{gib} << 30);
    const semu::Job job = *semu::JobFromProto(proto);
    batch = *semu::BatchFromProto(
        *semu::SampleBatch(proto, {.microbatches = 8}), job);
    const auto plan =
        PlanBaseline(Baseline::k1f1b, job, batch, batch, semu::RooflineCost());
    if (!plan.ok()) {
      EXPECT_LT(gib, 36);
      EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
      EXPECT_THAT(plan.status().message(), HasSubstr("rank "));
      EXPECT_THAT(plan.status().message(), HasSubstr("limit"));
      EXPECT_TRUE(last.has_value());
      return;
    }
    if (last.has_value()) {
      EXPECT_LE(plan->strategy, *last);
    }
    last = plan->strategy;
  }
  ADD_FAILURE() << "20 GiB cannot hold vlm-s";
}

TEST(PlanBaselineTest, NamesRoundTrip) {
  for (Baseline baseline : kAll) {
    EXPECT_EQ(BaselineFromName(BaselineName(baseline)), baseline);
  }
  EXPECT_EQ(BaselineFromName("gpipe"), std::nullopt);
}

}  // namespace
}  // namespace pipeweaver::search
