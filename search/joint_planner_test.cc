// Joint planning helps the slowest replica; moves keep every microbatch.

#include "search/joint_planner.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

struct Replicas {
  semu::Job job;
  std::vector<semu::Batch> batches;
  std::vector<const semu::Batch*> pointers;
};

// The last replica has the most images.
Replicas UnevenReplicas(int replicas, int microbatches) {
  const v1::Job proto = *semu::MakeSetup("vlm-s");
  Replicas result;
  result.job = *semu::JobFromProto(proto);
  for (int r = 0; r < replicas; ++r) {
    semu::SampleOptions sample;
    sample.seed = 1 + r;
    sample.microbatches = microbatches;
    sample.max_images = r + 1 == replicas ? 40 : 12;
    result.batches.push_back(
        *semu::BatchFromProto(*semu::SampleBatch(proto, sample), result.job));
  }
  for (const semu::Batch& batch : result.batches) {
    result.pointers.push_back(&batch);
  }
  return result;
}

int64_t Slowest(const std::vector<absl::StatusOr<StepPlan>>& plans) {
  int64_t slowest_ns = 0;
  for (const auto& plan : plans) {
    EXPECT_TRUE(plan.ok()) << plan.status();
    slowest_ns = std::max(slowest_ns, plan->report.makespan_ns);
  }
  return slowest_ns;
}

class JointPlannerTest : public testing::Test {
 protected:
  JointPlannerTest()
      : planner_(MakeStepPlanner()),
        replicas_(UnevenReplicas(4, 8)),
        job_(*planner_->Prepare(replicas_.job, std::nullopt, {})) {}

  std::unique_ptr<StepPlanner> planner_;
  Replicas replicas_;
  std::shared_ptr<const PlannableJob> job_;
};

TEST_F(JointPlannerTest, TheSlowestGetsTheSearch) {
  PlanOptions options;
  options.search.budget.evaluations = 400;
  const auto plans = PlanJointly(*planner_, *job_, replicas_.pointers, options);
  ASSERT_EQ(plans.size(), 4);
  const int64_t joint_ns = Slowest(plans);
  EXPECT_EQ(plans[3]->report.makespan_ns, joint_ns);
  for (int r = 0; r < 3; ++r) {
    EXPECT_GT(plans[3]->report.evaluations, plans[r]->report.evaluations);
  }
  // What every replica had first is a start that the joint plan is not above.
  options.search.budget.evaluations = 25;
  std::vector<absl::StatusOr<StepPlan>> alone;
  for (const semu::Batch* batch : replicas_.pointers) {
    alone.push_back(planner_->Plan(*job_, *batch, options));
  }
  EXPECT_LE(joint_ns, Slowest(alone));
}

TEST_F(JointPlannerTest, IsTheSameForAnyThreads) {
  std::vector<int64_t> makespans[2];
  for (const int threads : {1, 3}) {
    PlanOptions options;
    options.search.budget.evaluations = 100;
    options.search.threads = threads;
    for (const auto& plan :
         PlanJointly(*planner_, *job_, replicas_.pointers, options)) {
      makespans[threads / 2].push_back(plan->report.makespan_ns);
    }
  }
  EXPECT_EQ(makespans[0], makespans[1]);
}

TEST_F(JointPlannerTest, MovesKeepEveryMicrobatchAndEvenOutTheLoad) {
  const MicrobatchMoves moves =
      *EvenOutReplicas(replicas_.job, replicas_.pointers, semu::OpGraphCost());
  std::set<std::pair<int, int>> seen;
  for (size_t r = 0; r < moves.size(); ++r) {
    EXPECT_EQ(moves[r].size(), replicas_.batches[r].microbatches.size());
    for (const MicrobatchOrigin& origin : moves[r]) {
      EXPECT_TRUE(seen.emplace(origin.replica, origin.microbatch).second);
    }
  }
  EXPECT_EQ(seen.size(), 4u * 8u);
  const std::vector<semu::Batch> moved = ApplyMoves(replicas_.pointers, moves);
  std::vector<const semu::Batch*> pointers;
  pointers.reserve(moved.size());
  for (const semu::Batch& batch : moved) pointers.push_back(&batch);
  PlanOptions options;
  options.search.budget.evaluations = 200;
  EXPECT_LT(
      Slowest(PlanJointly(*planner_, *job_, pointers, options)),
      Slowest(PlanJointly(*planner_, *job_, replicas_.pointers, options)));
}

TEST_F(JointPlannerTest, DealsOutOnlyWhatGains) {
  const auto dealt = DealOut(*job_, replicas_.pointers);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  ASSERT_TRUE(dealt->has_value());
  EXPECT_EQ((*dealt)->moves,
            *EvenOutReplicas(replicas_.job, replicas_.pointers, *job_->costs));
  // Dealt out once, there is nothing to gain any more.
  std::vector<const semu::Batch*> even;
  for (const semu::Batch& batch : (*dealt)->batches) even.push_back(&batch);
  const auto again = DealOut(*job_, even);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_FALSE(again->has_value());
  // A validation batch is not trained on.
  replicas_.batches[1].forward_only = true;
  const auto mixed = DealOut(*job_, replicas_.pointers);
  ASSERT_TRUE(mixed.ok()) << mixed.status();
  EXPECT_FALSE(mixed->has_value());
}

// Layers take as long as a cost can say where there are many tokens.
class SlowCost : public semu::CostModel {
 public:
  semu::LayerCost Cost(const semu::Platform&,
                       const semu::LayerQuery& query) const override {
    semu::LayerCost cost;
    for (semu::StrategyCost& strategy : cost.strategies) {
      strategy.forward_ns =
          std::min(query.shape.tokens * 1'000'000'000'000, semu::kMaxCost);
    }
    return cost;
  }
  std::string Fingerprint() const override { return "slow"; }
};

TEST(DealOutTest, WorkOfAReplicaMayPassInt64) {
  // Microbatches of 4096 layers, which take up to 1e14 ns each: those of
  // replica 0 take 100 times as long as those of replica 1.
  PlannableJob job;
  job.costs = std::make_shared<SlowCost>();
  job.job = *semu::JobFromProto(*semu::MakeSetup("vlm-s"));
  job.job.modules.erase(job.job.modules.begin());
  job.job.edges.clear();
  job.job.modules[0].layers = {job.job.modules[0].layers[1]};
  job.job.modules[0].layers[0].count = 4096;
  std::vector<semu::Batch> batches(2);
  for (int r = 0; r < 2; ++r) {
    batches[r].microbatches.resize(64);
    for (semu::Microbatch& microbatch : batches[r].microbatches) {
      microbatch.item_tokens = {{r == 0 ? 100 : 1}};
    }
  }
  const semu::Batch* const pointers[] = {&batches[0], &batches[1]};
  const auto dealt = DealOut(job, pointers);
  ASSERT_TRUE(dealt.ok()) << dealt.status();
  ASSERT_TRUE(dealt->has_value());
  for (const semu::Batch& batch : (*dealt)->batches) {
    int heavy = 0;
    for (const semu::Microbatch& microbatch : batch.microbatches) {
      heavy += microbatch.item_tokens[0][0] == 100;
    }
    EXPECT_EQ(heavy, 32);
  }
  job.job.modules[0].layers[0].count = 50'000;
  EXPECT_EQ(DealOut(job, pointers).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace pipeweaver::search
