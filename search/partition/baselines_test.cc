// Baselines are valid, within memory, and in the order they claim.

#include "search/partition/baselines.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/plan/plan_checker.h"
#include "search/problem/problem_validation.h"
#include "search/testing/slowest_cost.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

// These may run out of memory where 1F1B does not.
bool HoldsMoreThan1f1b(Baseline baseline) {
  return baseline == Baseline::kGpipe || baseline == Baseline::kOptimus ||
         baseline == Baseline::kZbH1 || baseline == Baseline::kZbV ||
         baseline == Baseline::kNested;
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
      for (Baseline baseline : AllBaselines()) {
        SCOPED_TRACE(absl::StrCat(name, " ", BaselineName(baseline)));
        const auto plan =
            PlanBaseline(baseline, job, batch, batch, semu::OpGraphCost());
        if (absl::IsResourceExhausted(plan.status())) {
          EXPECT_THAT(plan.status().message(), HasSubstr("rank "));
          EXPECT_THAT(plan.status().message(), HasSubstr("limit"));
          EXPECT_TRUE(HoldsMoreThan1f1b(baseline));
          continue;
        }
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
    return PlanBaseline(baseline, job, batch, batch, semu::OpGraphCost())
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
        PlanBaseline(Baseline::k1f1b, job, batch, batch, semu::OpGraphCost());
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

TEST(PlanBaselineTest, NestedIsHardlySlowerWithMoreMemory) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  double with_less_ns = std::numeric_limits<double>::infinity();
  for (const int gib : {35, 45, 60, 75}) {
    proto.set_memory_budget_bytes(int64_t{gib} << 30);
    const semu::Job job = *semu::JobFromProto(proto);
    const semu::Batch batch = *semu::BatchFromProto(
        *semu::SampleBatch(proto, {.microbatches = 16}), job);
    const auto plan =
        PlanBaseline(Baseline::kNested, job, batch, batch, semu::OpGraphCost());
    ASSERT_TRUE(plan.ok()) << plan.status();
    const auto ns = static_cast<double>(plan->times.makespan_ns);
    EXPECT_LE(ns, 1.05 * with_less_ns) << gib;
    with_less_ns = std::min(with_less_ns, ns);
  }
}

TEST(PlanBaselineTest, SaysWhyItDoesNotApply) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_executor()->set_v_placement(false);
  semu::Job job = *semu::JobFromProto(proto);
  const semu::Batch batch = *semu::BatchFromProto(
      *semu::SampleBatch(proto, {.microbatches = 4}), job);
  const auto status = [&](Baseline baseline) {
    return PlanBaseline(baseline, job, batch, batch, semu::OpGraphCost())
        .status();
  };
  EXPECT_EQ(status(Baseline::kZbV).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status(Baseline::kZbV).message(),
              HasSubstr("executor.v_placement is false"));
  job.executor.split_backward = false;
  EXPECT_THAT(status(Baseline::kZbH1).message(),
              HasSubstr("executor.split_backward is false"));
  job.modules[1].layers = {job.modules[1].layers[0]};
  job.modules[1].layers[0].count = 2;
  EXPECT_EQ(status(Baseline::kOptimus).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status(Baseline::kOptimus).message(),
              HasSubstr("has 2 layers: must have at least one for each of the "
                        "4 ranks"));
  job.modules[1].layers[0].count = 1;
  job.modules[0].layers = {job.modules[0].layers[0]};
  job.modules[1].layers = {job.modules[1].layers[0]};
  EXPECT_THAT(status(Baseline::kGpipe).message(),
              HasSubstr("2 layers on 4 ranks"));
}

TEST(PlanBaselineTest, TimesThatSumUpToTooMuchAreInvalid) {
  const v1::Job proto = *semu::MakeSetup("vlm-s");
  semu::Job job = *semu::JobFromProto(proto);
  const semu::Batch batch = *semu::BatchFromProto(
      *semu::SampleBatch(proto, {.microbatches = 1}), job);
  for (semu::Module& module : job.modules) {
    module.layers = {module.layers[1]};
    module.layers[0].count = 20'000;
  }
  for (Baseline baseline : AllBaselines()) {
    SCOPED_TRACE(BaselineName(baseline));
    const auto plan =
        PlanBaseline(baseline, job, batch, batch, testing::SlowestCost());
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(plan.status().message(), HasSubstr("all layers take"));
  }
}

TEST(PlanBaselineTest, MicrobatchesThatFillAnOrderUpAreBoundedToo) {
  semu::Job job = *semu::JobFromProto(*semu::MakeSetup("vlm-s"));
  job.parallelism.pipeline_parallel = 1200;
  for (semu::Module& module : job.modules) {
    module.layers = {module.layers[1]};
    module.layers[0].count = 2400;
  }
  semu::Microbatch microbatch;
  microbatch.item_tokens = {{64}, {100}};
  microbatch.uses = {{semu::ItemUse{0, 0}}};
  semu::Batch batch;
  batch.microbatches.assign(64, microbatch);
  for (Baseline baseline :
       {Baseline::kMegatron, Baseline::kInterleaved1f1b, Baseline::kNnScaler,
        Baseline::kOptimus, Baseline::kZbV}) {
    const absl::Status status =
        PlanBaseline(baseline, job, batch, batch, semu::OpGraphCost()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(
        status.message(),
        HasSubstr(absl::StrCat(
            "baseline ", BaselineName(baseline), " has ",
            baseline == Baseline::kZbV
                ? "2399 microbatches on 1200 ranks, 2335"
                : "1200 microbatches on 1200 ranks, 1136",
            " of which fill its order up: their product must be at most "
            "1048576")));
  }
}

// Sets a flag as soon as a cost is asked for.
class CancellingCost : public semu::OpGraphCost {
 public:
  semu::LayerCost Cost(const semu::Platform& platform,
                       const semu::LayerQuery& query) const override {
    cancelled = true;
    return OpGraphCost::Cost(platform, query);
  }

  mutable std::atomic<bool> cancelled = false;
};

TEST(PlanBaselineTest, EndsWhenCancelled) {
  const v1::Job proto = *semu::MakeSetup("vlm-s");
  const semu::Job job = *semu::JobFromProto(proto);
  const semu::Batch batch = *semu::BatchFromProto(
      *semu::SampleBatch(proto, {.microbatches = 4}), job);
  for (Baseline baseline : AllBaselines()) {
    SCOPED_TRACE(BaselineName(baseline));
    const CancellingCost costs;
    const auto plan =
        PlanBaseline(baseline, job, batch, batch, costs, &costs.cancelled);
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kCancelled);
  }
}

TEST(PlanBaselineTest, AMeanBatchThatTakesTooLongIsInvalid) {
  // The reference can be planned; 4096 of its microbatch are too much.
  const v1::Job proto = *semu::MakeSetup("vlm-s");
  const semu::Job job = *semu::JobFromProto(proto);
  const semu::Batch reference = *semu::BatchFromProto(
      *semu::SampleBatch(proto, {.microbatches = 1}), job);
  const auto plans =
      FindStaticPlans(job, reference, 4096, testing::SlowestCost());
  EXPECT_EQ(plans.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(plans.status().message(),
              HasSubstr("the mean microbatch 4096 times"));
}

TEST(PlanBaselineTest, AStaticPlanIsKeptForOtherBatches) {
  const v1::Job proto = *semu::MakeSetup("vlm-s");
  const semu::Job job = *semu::JobFromProto(proto);
  const auto batch = [&](uint64_t seed) {
    return *semu::BatchFromProto(
        *semu::SampleBatch(proto, {.seed = seed, .microbatches = 12}), job);
  };
  const auto plans = FindStaticPlans(job, batch(1), 12, semu::OpGraphCost());
  ASSERT_TRUE(plans.ok()) << plans.status();
  for (size_t i = 1; i < plans->size(); ++i) {
    EXPECT_LE((*plans)[i - 1].mean_batch_ns, (*plans)[i].mean_batch_ns);
  }
  for (const uint64_t seed : {2, 3}) {
    const auto plan =
        PlanStatically(*plans, job, batch(seed), semu::OpGraphCost());
    ASSERT_TRUE(plan.ok()) << plan.status();
    const auto bytes = [&](const semu::Layout& layout) {
      return semu::LayoutToProto(layout, job).SerializeAsString();
    };
    EXPECT_TRUE(
        std::any_of(plans->begin(), plans->end(), [&](const StaticPlan& found) {
          return bytes(found.chain.layout) == bytes(plan->layout) &&
                 found.strategy == plan->strategy;
        }));
    EXPECT_TRUE(
        CheckPlan(plan->step.problem, plan->schedule, plan->times).ok());
  }
}

TEST(PlanBaselineTest, NamesRoundTrip) {
  for (Baseline baseline : AllBaselines()) {
    EXPECT_EQ(BaselineFromName(BaselineName(baseline)), baseline);
  }
  EXPECT_EQ(BaselineFromName("2f2b"), std::nullopt);
}

}  // namespace
}  // namespace pipeweaver::search
