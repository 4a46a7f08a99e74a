// The paper's anchors, and what must hold of costs whatever the factors.

#include "semu/cost/roofline_cost.h"

#include <cstdint>

#include "gtest/gtest.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

Shape Items(int64_t count, int64_t tokens) {
  return {count, count * tokens, count * tokens * tokens, tokens, 0, 0};
}

Job JobOf(const char* name) { return *JobFromProto(*MakeSetup(name)); }

int64_t ForwardAndBackwardNs(const Job& job, const LayerSpec& layer,
                             const Shape& shape) {
  const StrategyCost cost = RooflineCost().Cost(
      PlatformOf(job), {layer, shape})[MemoryStrategy::kKeep];
  return cost.forward_ns + *cost.fused_backward_ns;
}

TEST(RooflineCostTest, MeetsThePapersAnchors) {
  const Job job = JobOf("vlm-m");
  const int64_t vision =
      ForwardAndBackwardNs(job, job.modules[0].layers[1].layer, Items(8, 2704));
  const int64_t language =
      ForwardAndBackwardNs(job, job.modules[1].layers[1].layer, Items(1, 8192));
  EXPECT_NEAR(static_cast<double>(vision), 6.75e6, 0.07 * 6.75e6);
  EXPECT_NEAR(static_cast<double>(language), 10.5e6, 0.07 * 10.5e6);
}

TEST(RooflineCostTest, EveryStrategyTradesTimeForMemory) {
  for (const std::string& name : SetupNames()) {
    const Job job = *JobFromProto(*MakeSetup(name));
    for (const Module& module : job.modules) {
      for (const LayerGroup& group : module.layers) {
        Shape shape = Items(3, 1000);
        shape.condition_tokens = 300;
        shape.condition_products = 300000;
        const LayerCost cost =
            RooflineCost().Cost(PlatformOf(job), {group.layer, shape});
        const StrategyCost& keep = cost[MemoryStrategy::kKeep];
        for (const StrategyCost& other : cost.strategies) {
          EXPECT_EQ(other.forward_ns, keep.forward_ns);
          EXPECT_GE(other.input_grad_ns, keep.input_grad_ns);
          EXPECT_LE(other.kept_bytes, keep.kept_bytes);
          EXPECT_EQ(other.kept_bytes + other.rebuilt_bytes, keep.kept_bytes);
          EXPECT_LE(*other.fused_backward_ns,
                    other.input_grad_ns + other.weight_grad_ns);
        }
        EXPECT_LE(cost[MemoryStrategy::kFullRecompute].kept_bytes,
                  cost[MemoryStrategy::kSelectiveRecompute].kept_bytes);
        EXPECT_GT(cost.output_bytes, 0);
      }
    }
  }
}

TEST(RooflineCostTest, AFrozenLayerHasNoWeightGradientAndKeepsLess) {
  const Job job = JobOf("vlm-s");
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const Platform platform = PlatformOf(job);
  const LayerCost trained =
      RooflineCost().Cost(platform, {layer, Items(1, 4096)});
  const LayerCost frozen = RooflineCost().Cost(
      platform, {layer, Items(1, 4096), /*weight_grad=*/false});
  const StrategyCost& keep = frozen[MemoryStrategy::kKeep];
  EXPECT_EQ(keep.weight_grad_ns, 0);
  EXPECT_FALSE(keep.fused_backward_ns.has_value());
  EXPECT_EQ(keep.input_grad_ns, trained[MemoryStrategy::kKeep].input_grad_ns);
  EXPECT_LT(keep.kept_bytes, trained[MemoryStrategy::kKeep].kept_bytes);

  const LayerCost forward = RooflineCost().Cost(
      platform, {layer, Items(1, 4096), false, /*input_grad=*/false});
  EXPECT_EQ(forward[MemoryStrategy::kKeep].input_grad_ns, 0);
  EXPECT_EQ(forward[MemoryStrategy::kKeep].kept_bytes, 0);
  EXPECT_GT(forward.forward_bytes, 0);
}

TEST(RooflineCostTest, AttentionGrowsWithSquaresAndHalvesWhenCausal) {
  const Job job = JobOf("vlm-s");
  LayerSpec layer = job.modules[1].layers[1].layer;
  const Platform platform = PlatformOf(job);
  const auto forward = [&](const Shape& shape) {
    return RooflineCost()
        .Cost(platform, {layer, shape})[MemoryStrategy::kKeep]
        .forward_ns;
  };
  const int64_t one = forward(Items(1, 8192));
  const int64_t many = forward(Items(8, 1024));
  EXPECT_GT(one, many);
  layer.causal = false;
  EXPECT_NEAR(static_cast<double>(forward(Items(1, 8192)) - one),
              static_cast<double>(one - many) * 8 / 7,
              0.05 * static_cast<double>(one - many));
}

TEST(RooflineCostTest, GpusShareWorkAndMemory) {
  Job job = JobOf("vlm-s");
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const auto cost = [&] {
    return RooflineCost().Cost(PlatformOf(job), {layer, Items(1, 65536)});
  };
  job.parallelism.tensor_parallel = 1;
  const LayerCost alone = cost();
  job.parallelism.tensor_parallel = 2;
  const LayerCost two = cost();
  job.parallelism.tensor_parallel = 1;
  job.parallelism.context_parallel = 2;
  const LayerCost context = cost();
  for (const LayerCost& shared : {two, context}) {
    const StrategyCost& a = alone[MemoryStrategy::kKeep];
    const StrategyCost& b = shared[MemoryStrategy::kKeep];
    EXPECT_GT(b.forward_ns, a.forward_ns / 2);
    EXPECT_LT(b.forward_ns, a.forward_ns);
    EXPECT_NEAR(static_cast<double>(b.kept_bytes),
                static_cast<double>(a.kept_bytes) / 2, 2.0);
  }
}

TEST(RooflineCostTest, HugeInputsSaturate) {
  Job job = JobOf("vlm-s");
  job.device.peak_flops_per_second = 1'000'000;
  LayerSpec layer = job.modules[1].layers[1].layer;
  layer.hidden_size = layer.ffn_size = 1 << 24;
  const int64_t n = kMaxMicrobatchTokens;
  const LayerCost cost =
      RooflineCost().Cost(PlatformOf(job), {layer, {1, n, n * n, n, 0, 0}});
  EXPECT_EQ(cost[MemoryStrategy::kKeep].forward_ns, 100'000'000'000'000);
  EXPECT_LE(cost[MemoryStrategy::kKeep].kept_bytes, 100'000'000'000'000);
}

TEST(RooflineCostTest, FingerprintsTellFactorsApart) {
  RooflineFactors factors = DefaultFactors("H800-80GB");
  const std::string first = RooflineCost(factors).Fingerprint();
  factors[0].launch_ns += 1;
  EXPECT_NE(first, RooflineCost(factors).Fingerprint());
  EXPECT_NE(first, RooflineCost().Fingerprint());
}

}  // namespace
}  // namespace pipeweaver::semu
