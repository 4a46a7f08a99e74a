// Tests of fitted corrections and of the model that applies them.

#include "semu/cost/calibration/calibration.h"

#include <cmath>
#include <cstdint>
#include <random>

#include "gtest/gtest.h"
#include "semu/cost/calibration/calibrated_cost.h"

namespace pipeweaver::semu {
namespace {

constexpr int kForward = CostPart(LayerKind::kTransformer, CostPass::kForward);
constexpr int kHead = CostPart(LayerKind::kLmHead, CostPass::kForward);

// Stages of transformer layers, every third with a head, that take 1.4 and 0.7
// times what was predicted, with a little noise and now and then a disturbance.
CostObservation Stage(int i) {
  CostObservation observation;
  observation.predicted_ns[kForward] = 1'000'000 * (1 + i % 4);
  if (i % 3 == 0) observation.predicted_ns[kHead] = 2'000'000;
  double ns = 1.4 * static_cast<double>(observation.predicted_ns[kForward]) +
              0.7 * static_cast<double>(observation.predicted_ns[kHead]);
  ns *= 1 + 0.01 * std::sin(i * 1.7);
  if (i % 10 == 7) ns *= 3;
  observation.measured_ns = static_cast<int64_t>(ns);
  return observation;
}

TEST(CalibratorTest, FindsTheFactorsBehindStageTimes) {
  Calibrator calibrator;
  for (int i = 0; i < 100; ++i) calibrator.Add(Stage(i));
  const std::optional<Calibration> calibration = calibrator.Publish();
  ASSERT_TRUE(calibration);
  EXPECT_EQ(calibration->version, 1);
  EXPECT_NEAR(calibration->factors[kForward], 1.4, 0.03);
  EXPECT_NEAR(calibration->factors[kHead], 0.7, 0.03);
  EXPECT_EQ(
      calibration->factors[CostPart(LayerKind::kDit, CostPass::kInputGrad)], 1)
      << "never seen";
  EXPECT_LT(calibration->error_after, 0.1);
  EXPECT_GT(calibration->error_before, 0.2);
  EXPECT_EQ(calibration->observations, 100);
}

TEST(CalibratorTest, VersionsAreDiscrete) {
  Calibrator calibrator;
  for (int i = 0; i < 7; ++i) calibrator.Add(Stage(i));
  EXPECT_FALSE(calibrator.Publish()) << "too few";
  for (int i = 7; i < 100; ++i) calibrator.Add(Stage(i));
  ASSERT_TRUE(calibrator.Publish());
  for (int i = 100; i < 120; ++i) calibrator.Add(Stage(i));
  EXPECT_FALSE(calibrator.Publish()) << "nothing moved by a hundredth";
  EXPECT_EQ(calibrator.current().version, 1);
  // The machine gets slower.
  for (int i = 0; i < 3000; ++i) {
    CostObservation slower = Stage(i);
    slower.measured_ns = slower.measured_ns * 11 / 10;
    calibrator.Add(slower);
  }
  const std::optional<Calibration> next = calibrator.Publish();
  ASSERT_TRUE(next);
  EXPECT_EQ(next->version, 2);
  EXPECT_NEAR(next->factors[kForward], 1.54, 0.03);
}

TEST(CalibratorTest, FactorsThatLittleDependsOnMakeNoVersions) {
  Calibrator calibrator;
  std::mt19937_64 random(1);
  std::normal_distribution<double> noise(1, 0.01);
  int versions = 0;
  for (int step = 0; step < 60; ++step) {
    for (int i = 0; i < 64; ++i) {
      // The head is a hundredth of the stages that it is in.
      CostObservation stage;
      stage.predicted_ns[kForward] = 1'000'000 * (1 + i % 4);
      if (i % 3 == 0) stage.predicted_ns[kHead] = 20'000;
      stage.measured_ns =
          std::llround(noise(random) * 1.2 *
                       static_cast<double>(stage.predicted_ns[kForward] +
                                           stage.predicted_ns[kHead]));
      stage.step = step;
      calibrator.Add(stage);
    }
    if (calibrator.Publish()) ++versions;
  }
  EXPECT_EQ(versions, 1);
  EXPECT_NEAR(calibrator.current().factors[kForward], 1.2, 0.01);
}

// Sixty stages that took `slower` times as long as usual.
void AddStep(int64_t step, double slower, Calibrator* calibrator) {
  for (int i = 0; i < 60; ++i) {
    CostObservation stage = Stage(i);
    stage.measured_ns =
        std::llround(slower * static_cast<double>(stage.measured_ns));
    stage.step = step;
    calibrator->Add(stage);
  }
}

TEST(CalibratorTest, FollowsTheSpeedOfTheLatestSteps) {
  Calibrator calibrator;
  EXPECT_FALSE(calibrator.PublishSpeed()) << "no fit yet";
  const auto add = [&](int64_t step, double slower) {
    AddStep(step, slower, &calibrator);
  };
  for (int64_t step = 0; step < 20; ++step) add(step, 1);
  ASSERT_TRUE(calibrator.Publish());
  const double fitted = calibrator.current().factors[kForward];
  add(20, 1);
  EXPECT_FALSE(calibrator.PublishSpeed()) << "no change but noise";
  add(21, 1.2);
  add(22, 1.2);
  const std::optional<Calibration> slow = calibrator.PublishSpeed();
  ASSERT_TRUE(slow);
  EXPECT_NEAR(slow->factors[kForward] / fitted, 1.2, 0.01);
  EXPECT_NEAR(slow->factors[kHead], 0.7 * 1.2, 0.03);
  EXPECT_EQ(slow->factors[CostPart(LayerKind::kDit, CostPass::kInputGrad)], 1)
      << "never seen";
  EXPECT_LT(slow->error_after, slow->error_before);
  // A fit over mostly older steps does not lose it.
  calibrator.Publish();
  EXPECT_NEAR(calibrator.current().factors[kForward] / fitted, 1.2, 0.02);
  add(23, 1);
  add(24, 1);
  ASSERT_TRUE(calibrator.PublishSpeed());
  EXPECT_NEAR(calibrator.current().factors[kForward] / fitted, 1, 0.02);
  // One slow step is not a slower machine, whatever the speed before it.
  int64_t step = 25;
  for (const double speed : {1.0, 0.8, 1.3}) {
    add(step++, speed);
    add(step++, speed);
    calibrator.PublishSpeed();
    for (const double slower : {5.0, 1.2, 1.0}) {
      add(step++, speed * slower);
      calibrator.PublishSpeed();
      EXPECT_NEAR(calibrator.current().factors[kForward] / fitted, speed, 0.02)
          << "after a step that took " << slower << " times as long";
      add(step++, speed);
      calibrator.PublishSpeed();
      EXPECT_NEAR(calibrator.current().factors[kForward] / fitted, speed, 0.02);
    }
  }
}

TEST(CalibratorTest, OneStepAfterNewCostsTellsNoSpeed) {
  Calibrator calibrator;
  const auto add = [&](int64_t step, double slower) {
    AddStep(step, slower, &calibrator);
  };
  for (int64_t step = 0; step < 20; ++step) add(step, 1);
  ASSERT_TRUE(calibrator.Publish());
  calibrator.ForgetObservations();
  add(20, 3);
  EXPECT_FALSE(calibrator.PublishSpeed());
  add(21, 1);
  EXPECT_FALSE(calibrator.PublishSpeed());
}

TEST(CalibratorTest, FollowsTheSpeedWhereTheWindowHoldsOneStep) {
  Calibrator calibrator({.window = 60});
  const auto add = [&](int64_t step, double slower) {
    AddStep(step, slower, &calibrator);
  };
  add(0, 1);
  ASSERT_TRUE(calibrator.Publish());
  const double fitted = calibrator.current().factors[kForward];
  add(1, 1.5);
  ASSERT_TRUE(calibrator.PublishSpeed());
  EXPECT_NEAR(calibrator.current().factors[kForward] / fitted, 1.5, 0.02);
}

TEST(CalibratorTest, KeepsTheFactorOfWhatTheWindowNoLongerHolds) {
  Calibrator calibrator({.window = 100});
  for (int i = 0; i < 100; ++i) calibrator.Add(Stage(i));
  ASSERT_TRUE(calibrator.Publish());
  const double head = calibrator.current().factors[kHead];
  EXPECT_NEAR(head, 0.7, 0.03);
  for (int i = 0; i < 100; ++i) {
    CostObservation headless;
    headless.step = 1;
    headless.predicted_ns[kForward] = 1'000'000;
    headless.measured_ns = 1'600'000;
    calibrator.Add(headless);
  }
  ASSERT_TRUE(calibrator.Publish());
  EXPECT_NEAR(calibrator.current().factors[kForward], 1.6, 0.03);
  EXPECT_NEAR(calibrator.current().factors[kHead], head, 0.01);
}

TEST(CalibratorTest, SaysNothingOfUselessObservations) {
  Calibrator calibrator;
  for (int i = 0; i < 20; ++i) {
    calibrator.Add({});
    CostObservation unmeasured = Stage(i);
    unmeasured.measured_ns = 0;
    calibrator.Add(unmeasured);
    CostObservation negative = Stage(i);
    negative.predicted_ns[kHead] = -1;
    calibrator.Add(negative);
  }
  EXPECT_FALSE(calibrator.Publish());
}

class FixedCost : public CostModel {
 public:
  LayerCost Cost(const Platform&, const LayerQuery&) const override {
    LayerCost cost;
    for (StrategyCost& strategy : cost.strategies) {
      strategy.forward_ns = 100;
      strategy.input_grad_ns = 200;
      strategy.weight_grad_ns = 100;
      strategy.fused_backward_ns = 240;
      strategy.kept_bytes = 7;
    }
    cost.copy_ns = 9;
    return cost;
  }
  std::string Fingerprint() const override { return "fixed"; }
};

TEST(CalibratedCostTest, CorrectsTimesOnly) {
  const FixedCost base;
  Calibration calibration;
  calibration.factors[CostPart(LayerKind::kDit, CostPass::kForward)] = 1.5;
  calibration.factors[CostPart(LayerKind::kDit, CostPass::kInputGrad)] = 2;
  const CalibratedCost model(base, calibration);
  LayerQuery query;
  query.layer.kind = LayerKind::kDit;
  const LayerCost cost = model.Cost({}, query);
  EXPECT_EQ(cost.strategies[0].forward_ns, 150);
  EXPECT_EQ(cost.strategies[0].input_grad_ns, 400);
  EXPECT_EQ(cost.strategies[0].weight_grad_ns, 100);
  EXPECT_EQ(*cost.strategies[0].fused_backward_ns, 400)
      << "240 * (400 + 100) / 300";
  EXPECT_EQ(cost.strategies[0].kept_bytes, 7);
  EXPECT_EQ(cost.copy_ns, 9);
  query.layer.kind = LayerKind::kEmbedding;
  EXPECT_EQ(model.Cost({}, query).strategies[3].forward_ns, 100);
  LayerQuery dit;
  dit.layer.kind = LayerKind::kDit;
  const std::vector<LayerCost> costs = model.CostAll({}, {query, dit});
  ASSERT_EQ(costs.size(), 2u);
  EXPECT_EQ(costs[0].strategies[3].forward_ns, 100);
  EXPECT_EQ(costs[1].strategies[3].forward_ns, 150);
}

TEST(CalibratedCostTest, FingerprintTellsFactorsNotVersions) {
  const FixedCost base;
  Calibration one;
  Calibration two;
  two.version = 5;
  EXPECT_EQ(CalibratedCost(base, one).Fingerprint(),
            CalibratedCost(base, two).Fingerprint());
  two.factors[0] = 1.25;
  EXPECT_NE(CalibratedCost(base, one).Fingerprint(),
            CalibratedCost(base, two).Fingerprint());
}

TEST(CorrectedReserveTest, GrowsByTheWorstExcessOnly) {
  EXPECT_EQ(CorrectedReserveBytes(1000, {}), 1000);
  EXPECT_EQ(CorrectedReserveBytes(1000, {{500, 300}, {500, 499}}), 1000);
  EXPECT_EQ(CorrectedReserveBytes(1000, {{500, 700}, {500, 600}}), 1200);
}

}  // namespace
}  // namespace pipeweaver::semu
