// Tests of what a job's costs learn, and when a version comes out.

#include "server/job_costs.h"

#include <memory>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/cost/op_graph_cost.h"
#include "server/testing/puppet_planner.h"

namespace pipeweaver::server {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

semu::Job SmallJob() {
  semu::Job job;
  job.parallelism.pipeline_parallel = 2;
  return job;
}

// The puppet's layers take a nanosecond a token.
semu::MeasuredLayer Forward(int64_t tokens, int64_t ns, int64_t count = 1) {
  semu::MeasuredLayer layer;
  layer.pass = semu::MeasuredPass::kForward;
  layer.shape = {1, tokens, tokens * tokens, tokens, 0, 0};
  layer.ns = ns;
  layer.count = count;
  return layer;
}

int64_t ForwardNs(const JobCosts& costs, int64_t tokens) {
  semu::LayerQuery query;
  query.shape = {1, tokens, tokens * tokens, tokens, 0, 0};
  return costs.current()
      ->costs->Cost(semu::PlatformOf(SmallJob()), query)
      .strategies[3]
      .forward_ns;
}

std::vector<semu::CostObservation> Observations(int count, double factor) {
  semu::CostObservation observation;
  observation.predicted_ns[semu::CostPart(
      semu::LayerKind::kTransformer, semu::CostPass::kForward)] = 1'000'000;
  observation.measured_ns = static_cast<int64_t>(factor * 1e6);
  return std::vector<semu::CostObservation>(count, observation);
}

class JobCostsTest : public ::testing::Test {
 protected:
  // By a job that holds the current version.
  bool TakeDue() { return costs_.TakeDue(*costs_.current()); }
  std::shared_ptr<const CostVersion> Publish() {
    const auto version = costs_.Publish(*costs_.current());
    costs_.EndPricing();
    return version;
  }

  PuppetPlanner planner_;
  JobCosts costs_{SmallJob(), planner_.Costs(), {}};
};

TEST_F(JobCostsTest, NothingIsDueWhereNothingIsLearnt) {
  EXPECT_EQ(costs_.current()->number, 0);
  EXPECT_EQ(ForwardNs(costs_, 100), 100);
  EXPECT_FALSE(TakeDue());
  EXPECT_EQ(Publish(), nullptr);
}

TEST_F(JobCostsTest, LayersKnownAheadAreInTheFirstVersion) {
  const JobCosts costs(SmallJob(), planner_.Costs(), {Forward(100, 250)});
  EXPECT_EQ(costs.current()->number, 0);
  EXPECT_EQ(costs.current()->measured_layers, 1);
  EXPECT_EQ(ForwardNs(costs, 100), 250);
}

TEST_F(JobCostsTest, LayersComeOutWhenTheySaySomethingNew) {
  costs_.AddLayers({Forward(100, 300), Forward(200, 600)});
  EXPECT_EQ(ForwardNs(costs_, 100), 100) << "not published yet";
  EXPECT_TRUE(TakeDue());
  EXPECT_FALSE(TakeDue()) << "somebody is at it";
  ASSERT_NE(Publish(), nullptr);
  EXPECT_EQ(costs_.current()->number, 1);
  EXPECT_EQ(ForwardNs(costs_, 100), 300);
  // Within a hundredth of what is known: the published version stays.
  costs_.AddLayers({Forward(150, 451)});
  EXPECT_TRUE(TakeDue());
  EXPECT_EQ(Publish(), nullptr);
  EXPECT_EQ(costs_.current()->number, 1);
  // Outside what was measured.
  costs_.AddLayers({Forward(400, 1200)});
  EXPECT_TRUE(TakeDue());
  ASSERT_NE(Publish(), nullptr);
  EXPECT_EQ(costs_.current()->number, 2);
  EXPECT_EQ(costs_.current()->measured_layers, 4);
}

TEST_F(JobCostsTest, PassesThatALayerHasNotSayNothingNew) {
  semu::MeasuredLayer embedding = Forward(100, 300);
  embedding.layer.kind = semu::LayerKind::kEmbedding;
  embedding.pass = semu::MeasuredPass::kInputGrad;
  JobCosts costs(SmallJob(), std::make_shared<semu::OpGraphCost>(), {});
  for (int i = 0; i < 3; ++i) {
    costs.AddLayers({embedding});
    costs.Publish(*costs.current());
    EXPECT_LE(costs.current()->number, 1) << "after upload " << i + 1;
  }
}

TEST_F(JobCostsTest, AJobThatHoldsAnEarlierVersionIsDueForTheCurrentOne) {
  const auto held = costs_.current();
  costs_.AddLayers({Forward(100, 300)});
  EXPECT_TRUE(costs_.TakeDue(*held));
  const auto published = costs_.Publish(*held);
  ASSERT_NE(published, nullptr);
  EXPECT_FALSE(costs_.TakeDue(*held)) << "somebody is at it";
  costs_.EndPricing();
  EXPECT_FALSE(costs_.TakeDue(*published));
  EXPECT_TRUE(costs_.TakeDue(*held));
  EXPECT_EQ(costs_.Publish(*held), published);
  EXPECT_EQ(costs_.Publish(*published), nullptr);
}

TEST_F(JobCostsTest, EarlierMeasurementsFade) {
  costs_.AddLayers({Forward(100, 300, 1'000'000)});
  costs_.AddLayers({Forward(100, 600, JobCosts::kMaxWeight)});
  ASSERT_NE(Publish(), nullptr);
  EXPECT_EQ(ForwardNs(costs_, 100), 450);
}

TEST_F(JobCostsTest, LayersNotMeasuredForLongGoFirst) {
  std::vector<semu::MeasuredLayer> many;
  for (int i = 1; i <= JobCosts::kMaxLayers; ++i) {
    many.push_back(Forward(i, 2 * i));
  }
  costs_.AddLayers(many);
  costs_.AddLayers({Forward(1, 2), Forward(1'000'000, 2'000'000)});
  const auto version = Publish();
  ASSERT_NE(version, nullptr);
  EXPECT_EQ(version->measured_layers, JobCosts::kMaxLayers);
  EXPECT_EQ(version->costs->measured().points().front().shape.tokens, 1);
  EXPECT_EQ(version->costs->measured().points()[1].shape.tokens, 3);
}

TEST_F(JobCostsTest, FactorsComeOutInDiscreteVersions) {
  costs_.AddObservations(*costs_.current(), 1, Observations(7, 1.5));
  EXPECT_FALSE(TakeDue()) << "too few";
  costs_.AddObservations(*costs_.current(), 1, Observations(20, 1.5));
  EXPECT_TRUE(TakeDue());
  const auto version = Publish();
  ASSERT_NE(version, nullptr);
  EXPECT_NEAR(static_cast<double>(ForwardNs(costs_, 1'000'000)), 1.5e6, 2e3);
  EXPECT_NEAR(version->calibration.error_before, 1.0 / 3, 0.01);
  EXPECT_LT(version->calibration.error_after, 0.01);
  costs_.AddObservations(*costs_.current(), 1, Observations(200, 1.5));
  EXPECT_TRUE(TakeDue());
  EXPECT_EQ(Publish(), nullptr) << "nothing moved";
}

TEST_F(JobCostsTest, SpeedIsFollowedBetweenFits) {
  for (int step = 1; step <= 10; ++step) {
    costs_.AddObservations(*costs_.current(), step, Observations(40, 1.5));
  }
  ASSERT_NE(Publish(), nullptr);
  // A tenth slower, and too few observations for a fit.
  costs_.AddObservations(*costs_.current(), 11, Observations(20, 1.65));
  EXPECT_TRUE(TakeDue());
  EXPECT_EQ(Publish(), nullptr) << "the step before still counts";
  costs_.AddObservations(*costs_.current(), 12, Observations(40, 1.65));
  EXPECT_TRUE(TakeDue());
  ASSERT_NE(Publish(), nullptr);
  EXPECT_NEAR(static_cast<double>(ForwardNs(costs_, 1'000'000)), 1.65e6, 2e3);
}

TEST_F(JobCostsTest, TheFirstLayersStartFactorsAnew) {
  const auto before = costs_.current();
  costs_.AddObservations(*before, 1, Observations(20, 1.5));
  ASSERT_NE(Publish(), nullptr);
  costs_.AddLayers({Forward(100, 300)});
  const auto version = Publish();
  ASSERT_NE(version, nullptr);
  EXPECT_EQ(version->calibration.observations, 0);
  EXPECT_EQ(ForwardNs(costs_, 100), 300);
  // What was observed on top of the old layers says nothing of the new ones.
  costs_.AddObservations(*before, 1, Observations(200, 1.5));
  EXPECT_FALSE(TakeDue());
}

TEST_F(JobCostsTest, FactorsOfMeasuredLayersStayUntilTheyAreFittedAgain) {
  costs_.AddLayers({Forward(100, 300)});
  ASSERT_NE(Publish(), nullptr);
  const auto before = costs_.current();
  costs_.AddObservations(*before, 1, Observations(20, 1.5));
  ASSERT_NE(Publish(), nullptr);
  EXPECT_NEAR(static_cast<double>(ForwardNs(costs_, 100)), 450, 1);
  costs_.AddLayers({Forward(200, 1000)});
  const auto version = Publish();
  ASSERT_NE(version, nullptr);
  EXPECT_EQ(version->measured_layers, 2);
  EXPECT_NEAR(static_cast<double>(ForwardNs(costs_, 100)), 450, 1);
  EXPECT_NEAR(static_cast<double>(ForwardNs(costs_, 200)), 1500, 3);
  // What was observed on top of the old layers says nothing of the new ones.
  costs_.AddObservations(*before, 1, Observations(200, 1.5));
  EXPECT_FALSE(TakeDue());
  costs_.AddObservations(*costs_.current(), 2, Observations(20, 1.2));
  EXPECT_TRUE(TakeDue());
  ASSERT_NE(Publish(), nullptr);
  EXPECT_NEAR(static_cast<double>(ForwardNs(costs_, 100)), 360, 1);
}

TEST_F(JobCostsTest, PeaksBeyondThePredictionAreSetAsideInSteps) {
  costs_.AddPeak(0, 1, 1000, 900);
  EXPECT_FALSE(TakeDue());
  costs_.AddPeak(0, 1, 1000, 1001);
  EXPECT_TRUE(TakeDue());
  ASSERT_NE(Publish(), nullptr);
  EXPECT_THAT(costs_.current()->extra_reserve_bytes,
              ElementsAre(0, JobCosts::kReserveStepBytes));
  costs_.AddPeak(0, 1, 1000, 2000);
  EXPECT_FALSE(TakeDue()) << "within the step";
  costs_.BeginLayout();
  EXPECT_THAT(costs_.current()->extra_reserve_bytes, IsEmpty());
  EXPECT_FALSE(TakeDue());
}

TEST_F(JobCostsTest, AMarkThatIsNeverResetIsSetAsideOnce) {
  constexpr int64_t kStep = JobCosts::kReserveStepBytes;
  costs_.AddPeak(0, 1, 10 * kStep, 11 * kStep);
  ASSERT_NE(Publish(), nullptr);
  // Plans need less each time, the mark stays.
  costs_.AddPeak(0, 1, 9 * kStep, 11 * kStep);
  costs_.AddPeak(0, 1, 8 * kStep, 11 * kStep);
  EXPECT_FALSE(TakeDue());
  // Another replica's is its own.
  costs_.AddPeak(1, 1, 9 * kStep, 11 * kStep);
  EXPECT_TRUE(TakeDue());
  ASSERT_NE(Publish(), nullptr);
  EXPECT_THAT(costs_.current()->extra_reserve_bytes, ElementsAre(0, 2 * kStep));
}

TEST_F(JobCostsTest, AReserveThatLeavesNoPlanIsTakenBackAlone) {
  constexpr int64_t kStep = JobCosts::kReserveStepBytes;
  costs_.AddPeak(0, 0, 1000, 1001);
  costs_.AddPeak(0, 1, 1000, 1000 + 100 * kStep);
  ASSERT_NE(Publish(), nullptr);
  auto version = costs_.RefuseReserve({});
  ASSERT_NE(version, nullptr);
  EXPECT_THAT(version->extra_reserve_bytes, ElementsAre(kStep, 0));
  EXPECT_EQ(version->number, 2);
  EXPECT_EQ(costs_.current(), version);
  // As much or more does not count, less does.
  costs_.AddPeak(0, 1, 1000, 1000 + 101 * kStep);
  EXPECT_FALSE(TakeDue());
  costs_.AddPeak(0, 1, 1000, 1000 + 2 * kStep);
  EXPECT_TRUE(TakeDue());
  ASSERT_NE(Publish(), nullptr);
  EXPECT_THAT(costs_.current()->extra_reserve_bytes,
              ElementsAre(kStep, 2 * kStep));
  EXPECT_EQ(costs_.RefuseReserve({kStep, 2 * kStep}), nullptr)
      << "nothing grew: the reserve is not what leaves no plan";
}

TEST_F(JobCostsTest, NamesDriftAndWhenItBeginsAndEnds) {
  EXPECT_FALSE(costs_.ObserveStep(0, 1, 1000, 1010).drift);
  JobCosts::DriftState state = costs_.ObserveStep(0, 2, 1000, 1500);
  ASSERT_TRUE(state.drift);
  EXPECT_TRUE(state.changed);
  EXPECT_EQ(state.drifting, 1);
  EXPECT_NEAR(state.drift->relative_error, 0.5, 1e-9);
  EXPECT_FALSE(costs_.ObserveStep(0, 3, 1000, 1500).changed);
  state = costs_.ObserveStep(1, 2, 1000, 1010);
  EXPECT_FALSE(state.drift);
  EXPECT_FALSE(state.changed) << "a replica each";
  EXPECT_EQ(state.drifting, 1);
  state = costs_.ObserveStep(1, 3, 1000, 1500);
  EXPECT_TRUE(state.changed);
  EXPECT_EQ(state.drifting, 2);
  state = costs_.ObserveStep(0, 4, 1000, 1000);
  EXPECT_FALSE(state.drift);
  EXPECT_TRUE(state.changed);
  EXPECT_EQ(state.drifting, 1);
  EXPECT_TRUE(costs_.ObserveStep(0, 5, 1000, 1500).changed);
  EXPECT_EQ(costs_.drifted_steps(), 4);
}

}  // namespace
}  // namespace pipeweaver::server
