// Tests of costs from measured layers.

#include "semu/cost/measured/measured_cost.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "semu/cost/measured/profile_layers.h"

namespace pipeweaver::semu {
namespace {

// 100 ns a token forward, 120 each gradient, 200 fused; recomputing adds a
// forward.
class LinearCost : public CostModel {
 public:
  LayerCost Cost(const Platform&, const LayerQuery& query) const override {
    LayerCost cost;
    const int64_t tokens = query.shape.tokens;
    for (int s = 0; s < kNumMemoryStrategies; ++s) {
      StrategyCost& strategy = cost.strategies[s];
      const bool keep = static_cast<MemoryStrategy>(s) == MemoryStrategy::kKeep;
      strategy.forward_ns = 100 * tokens;
      if (query.input_grad) {
        strategy.input_grad_ns = 120 * tokens + (keep ? 0 : 100 * tokens);
      }
      if (query.weight_grad) {
        strategy.weight_grad_ns = 120 * tokens;
        strategy.fused_backward_ns = 200 * tokens + (keep ? 0 : 100 * tokens);
      }
    }
    return cost;
  }
  std::string Fingerprint() const override { return "linear"; }
};

LayerSpec Layer() {
  LayerSpec layer;
  layer.hidden_size = 64;
  return layer;
}

MeasuredLayer Point(MeasuredPass pass, int64_t tokens, int64_t ns) {
  MeasuredLayer point;
  point.layer = Layer();
  point.pass = pass;
  point.shape.tokens = tokens;
  point.ns = ns;
  return point;
}

LayerQuery Query(int64_t tokens) {
  LayerQuery query;
  query.layer = Layer();
  query.shape.tokens = tokens;
  return query;
}

TEST(MeasuredCostTest, EqualShapesCountAsOftenAsTheyWereMeasured) {
  const LinearCost base;
  MeasuredLayer often = Point(MeasuredPass::kForward, 10, 1000);
  often.count = 3;
  const MeasuredCost model(base,
                           {often, Point(MeasuredPass::kForward, 10, 5000)});
  EXPECT_EQ(model.Cost({}, Query(10)).strategies[3].forward_ns, 2000);
}

TEST(MeasuredCostTest, PredictsPointsWithinWhatWasMeasured) {
  const LinearCost base;
  const MeasuredCost model(base, {Point(MeasuredPass::kForward, 10, 2000),
                                  Point(MeasuredPass::kForward, 40, 8000)});
  EXPECT_EQ(model.PredictNs({}, Point(MeasuredPass::kForward, 20, 1)), 4000);
  EXPECT_EQ(model.PredictNs({}, Point(MeasuredPass::kForward, 41, 1)),
            std::nullopt);
  EXPECT_EQ(model.PredictNs({}, Point(MeasuredPass::kBackward, 20, 1)),
            std::nullopt);
}

TEST(MeasuredCostTest, InterpolatesTheRatioAndFlagsExtrapolation) {
  const LinearCost base;
  const MeasuredCost model(base,
                           {Point(MeasuredPass::kForward, 1600, 2 * 160'000),
                            Point(MeasuredPass::kForward, 100, 10'000),
                            Point(MeasuredPass::kBackward, 100, 30'000),
                            Point(MeasuredPass::kBackward, 1600, 480'000)});
  const LayerCost at = model.Cost({}, Query(400));
  EXPECT_TRUE(at.measured);
  // Half-way from 100 to 1600 in the logarithm: ratio 1.5.
  EXPECT_EQ(at[MemoryStrategy::kKeep].forward_ns, 60'000);
  EXPECT_EQ(*at[MemoryStrategy::kKeep].fused_backward_ns, 120'000);
  EXPECT_EQ(at[MemoryStrategy::kKeep].weight_grad_ns, 72'000);
  EXPECT_EQ(*at[MemoryStrategy::kFullRecompute].fused_backward_ns, 180'000);
  for (const int64_t tokens : {100, 1600}) {
    EXPECT_TRUE(model.Cost({}, Query(tokens)).measured) << tokens;
  }
  const LayerCost above = model.Cost({}, Query(3200));
  EXPECT_FALSE(above.measured);
  EXPECT_EQ(above[MemoryStrategy::kKeep].forward_ns, 640'000);
  const LayerCost below = model.Cost({}, Query(50));
  EXPECT_FALSE(below.measured);
  EXPECT_EQ(below[MemoryStrategy::kKeep].forward_ns, 5'000);
  const std::vector<LayerCost> costs =
      model.CostAll({}, {Query(50), Query(400)});
  ASSERT_EQ(costs.size(), 2u);
  EXPECT_EQ(costs[0][MemoryStrategy::kKeep].forward_ns, 5'000);
  EXPECT_EQ(costs[1][MemoryStrategy::kKeep].forward_ns, 60'000);
  EXPECT_TRUE(costs[1].measured);
}

TEST(MeasuredCostTest, OtherLayersAndParallelismKeepTheBase) {
  const LinearCost base;
  const MeasuredCost model(base, {Point(MeasuredPass::kForward, 100, 50'000)});
  LayerQuery other = Query(100);
  other.layer.hidden_size = 65;
  EXPECT_EQ(model.Cost({}, other)[MemoryStrategy::kKeep].forward_ns, 10'000);
  Platform two;
  two.parallelism.tensor_parallel = 2;
  EXPECT_EQ(model.Cost(two, Query(100))[MemoryStrategy::kKeep].forward_ns,
            10'000);
  const LayerCost forward_known = model.Cost({}, Query(100));
  EXPECT_EQ(forward_known[MemoryStrategy::kKeep].forward_ns, 50'000);
  EXPECT_EQ(forward_known[MemoryStrategy::kKeep].input_grad_ns, 12'000);
  EXPECT_FALSE(forward_known.measured) << "its backward is not";
  LayerQuery inference = Query(100);
  inference.input_grad = inference.weight_grad = false;
  EXPECT_TRUE(model.Cost({}, inference).measured);
}

TEST(MeasuredCostTest, PartsMeasuredApartComeFirst) {
  const LinearCost base;
  const MeasuredCost model(base,
                           {Point(MeasuredPass::kForward, 100, 10'000),
                            Point(MeasuredPass::kBackward, 100, 60'000),
                            Point(MeasuredPass::kInputGrad, 100, 6'000),
                            Point(MeasuredPass::kWeightGrad, 100, 24'000)});
  const LayerCost cost = model.Cost({}, Query(100));
  EXPECT_EQ(cost[MemoryStrategy::kKeep].input_grad_ns, 6'000);
  EXPECT_EQ(cost[MemoryStrategy::kKeep].weight_grad_ns, 24'000);
  EXPECT_EQ(*cost[MemoryStrategy::kKeep].fused_backward_ns, 60'000);
  EXPECT_TRUE(cost.measured);
  // A frozen layer's backward is its input gradient.
  LayerQuery frozen = Query(100);
  frozen.weight_grad = false;
  EXPECT_EQ(model.Cost({}, frozen)[MemoryStrategy::kKeep].input_grad_ns, 6'000);
}

TEST(MeasuredCostTest, OrderAndRepeatsDoNotMatterUselessPointsAreLeftOut) {
  const LinearCost base;
  const MeasuredCost one(base, {Point(MeasuredPass::kForward, 100, 10'000),
                                Point(MeasuredPass::kForward, 200, 30'000)});
  const MeasuredCost two(base, {Point(MeasuredPass::kForward, 200, 20'000),
                                Point(MeasuredPass::kForward, 0, 5),
                                Point(MeasuredPass::kForward, 100, 10'000),
                                Point(MeasuredPass::kForward, 300, 0),
                                Point(MeasuredPass::kForward, 200, 40'000)});
  EXPECT_EQ(one.Fingerprint(), two.Fingerprint());
  EXPECT_NE(one.Fingerprint(), MeasuredCost(base, {}).Fingerprint());
}

// 1000 ns a token, and as much for each token of the condition.
class ConditionedCost : public CostModel {
 public:
  LayerCost Cost(const Platform&, const LayerQuery& query) const override {
    LayerCost cost;
    for (StrategyCost& strategy : cost.strategies) {
      strategy.forward_ns =
          1000 * (query.shape.tokens + query.shape.condition_products / 100);
    }
    return cost;
  }
  std::string Fingerprint() const override { return "conditioned"; }
};

// A layer of one item with `condition` tokens to attend to.
MeasuredLayer DitPoint(int64_t tokens, int64_t condition, int64_t ns) {
  MeasuredLayer point = Point(MeasuredPass::kForward, tokens, ns);
  point.layer.kind = LayerKind::kDit;
  point.shape.items = 1;
  point.shape.condition_tokens = condition;
  point.shape.condition_products = tokens * condition;
  return point;
}

LayerCost DitCost(const MeasuredCost& model, int64_t tokens,
                  int64_t condition) {
  LayerQuery query;
  query.weight_grad = query.input_grad = false;
  query.layer = DitPoint(1, 0, 0).layer;
  query.shape = DitPoint(tokens, condition, 0).shape;
  return model.Cost({}, query);
}

int64_t ForwardNs(const LayerCost& cost) {
  return cost[MemoryStrategy::kKeep].forward_ns;
}

TEST(MeasuredCostTest, OfEqualTokensTheLikestConditionIsTaken) {
  const ConditionedCost base;
  // Twice the base at short conditions, three times at long ones.
  const MeasuredCost model(
      base, {DitPoint(100, 100, 400'000), DitPoint(100, 900, 3'000'000),
             DitPoint(400, 100, 1'600'000), DitPoint(400, 900, 12'000'000)});
  EXPECT_EQ(ForwardNs(DitCost(model, 100, 200)), 600'000);
  EXPECT_EQ(ForwardNs(DitCost(model, 200, 200)), 1'200'000);
  EXPECT_EQ(ForwardNs(DitCost(model, 200, 800)), 5'400'000);
  EXPECT_TRUE(DitCost(model, 200, 800).measured);
  EXPECT_FALSE(DitCost(model, 200, 1000).measured);
  EXPECT_FALSE(DitCost(model, 100, 50).measured);
  EXPECT_FALSE(DitCost(model, 800, 200).measured);
}

TEST(MeasuredCostTest, APointSilentOfItsConditionIsTakenToHaveTheAskedOne) {
  const ConditionedCost base;
  const MeasuredLayer silent = DitPoint(100, 0, 600'000);
  // 600'000 ns at a condition of 200 is twice the base.
  const MeasuredCost model(base, {silent});
  EXPECT_EQ(ForwardNs(DitCost(model, 100, 200)), 600'000);
  EXPECT_TRUE(DitCost(model, 100, 200).measured);
  EXPECT_EQ(ForwardNs(DitCost(model, 800, 200)), 4'800'000);
  // One that says is better, however far.
  const MeasuredCost both(base, {silent, DitPoint(100, 900, 3'000'000)});
  EXPECT_EQ(ForwardNs(DitCost(both, 100, 200)), 900'000);
}

TEST(ProfileLayersTest, TakesTheJobsLayers) {
  Job job;
  job.parallelism.tensor_parallel = 4;
  Module module;
  module.name = "vision";
  module.layers.push_back({Layer(), 3});
  job.modules.push_back(module);
  v1::Profile profile;
  const auto add = [&profile](const std::string& name, const std::string& kind,
                              v1::LayerPass pass) {
    v1::MeasuredPoint* point = profile.add_points();
    point->mutable_key()->set_kind(v1::POINT_KIND_LAYER);
    v1::LayerKey* key = point->mutable_key()->mutable_layer();
    key->set_module(name);
    key->set_layer(kind);
    key->set_pass(pass);
    key->set_tokens(64);
    key->set_condition_tokens(5);
    key->set_condition_products(320);
    point->set_median_ns(77);
  };
  add("vision", "transformer", v1::LAYER_PASS_BACKWARD);
  add("vision", "dit", v1::LAYER_PASS_FORWARD);
  add("audio", "transformer", v1::LAYER_PASS_FORWARD);
  add("vision", "transformer", v1::LAYER_PASS_UNSPECIFIED);
  const auto last = [&profile]() -> v1::MeasuredPoint& {
    return *profile.mutable_points(profile.points_size() - 1);
  };
  add("vision", "transformer", v1::LAYER_PASS_FORWARD);
  last().mutable_key()->mutable_layer()->set_tensor_parallel(2);
  add("vision", "transformer", v1::LAYER_PASS_FORWARD);
  last().mutable_key()->mutable_layer()->set_context_parallel(2);
  add("vision", "transformer", v1::LAYER_PASS_FORWARD);
  last().mutable_key()->mutable_layer()->set_tokens(0);
  add("vision", "transformer", v1::LAYER_PASS_FORWARD);
  last().set_median_ns(0);
  const std::vector<MeasuredLayer> layers = MeasuredLayersOf(profile, job);
  ASSERT_EQ(layers.size(), 1u);
  EXPECT_EQ(layers[0].layer, Layer());
  EXPECT_EQ(layers[0].tensor_parallel, 4);
  EXPECT_EQ(layers[0].pass, MeasuredPass::kBackward);
  EXPECT_EQ(layers[0].shape.tokens, 64);
  EXPECT_EQ(layers[0].shape.condition_tokens, 5);
  EXPECT_EQ(layers[0].shape.condition_products, 320);
  EXPECT_EQ(layers[0].ns, 77);
  // Figures that are not given.
  EXPECT_EQ(layers[0].shape.items, 1);
  EXPECT_EQ(layers[0].shape.sum_squares, 64 * 64);
  EXPECT_EQ(layers[0].shape.max_tokens, 64);

  // Which of two unlike layers a point is of, nobody knows.
  job.modules[0].layers.push_back({Layer(), 2});
  EXPECT_EQ(MeasuredLayersOf(profile, job).size(), 1u);
  job.modules[0].layers.back().layer.ffn_size += 1;
  EXPECT_TRUE(MeasuredLayersOf(profile, job).empty());
}

TEST(ProfileLayersTest, TokensAreOfEqualItemsWhereNothingElseIsSaid) {
  Job job;
  Module module;
  module.name = "vision";
  module.layers.push_back({Layer(), 1});
  job.modules.push_back(module);
  v1::Profile profile;
  v1::MeasuredPoint* point = profile.add_points();
  point->mutable_key()->set_kind(v1::POINT_KIND_LAYER);
  v1::LayerKey* key = point->mutable_key()->mutable_layer();
  key->set_module("vision");
  key->set_layer("transformer");
  key->set_pass(v1::LAYER_PASS_FORWARD);
  key->set_tokens(100);
  key->set_items(4);
  point->set_median_ns(1);
  const Shape shape = MeasuredLayersOf(profile, job).at(0).shape;
  EXPECT_EQ(shape.sum_squares, 4 * 25 * 25);
  EXPECT_EQ(shape.max_tokens, 25);
}

}  // namespace
}  // namespace pipeweaver::semu
