// The paper's anchors, what must hold of costs whatever the factors, and that
// reuse changes nothing.

#include "semu/cost/op_graph_cost.h"

#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"
#include "semu/store/memory_store.h"

namespace pipeweaver::semu {
namespace {

Shape Items(int64_t count, int64_t tokens) {
  return {count, count * tokens, count * tokens * tokens, tokens, 0, 0};
}

Job JobOf(const char* name) { return *JobFromProto(*MakeSetup(name)); }

int64_t ForwardAndBackwardNs(const Job& job, const LayerSpec& layer,
                             const Shape& shape) {
  const StrategyCost cost = OpGraphCost().Cost(
      PlatformOf(job), {layer, shape})[MemoryStrategy::kKeep];
  return cost.forward_ns + *cost.fused_backward_ns;
}

TEST(OpGraphCostTest, MeetsThePapersAnchors) {
  const Job job = JobOf("vlm-m");
  const int64_t vision =
      ForwardAndBackwardNs(job, job.modules[0].layers[1].layer, Items(8, 2704));
  const int64_t language =
      ForwardAndBackwardNs(job, job.modules[1].layers[1].layer, Items(1, 8192));
  EXPECT_NEAR(static_cast<double>(vision), 6.75e6, 0.07 * 6.75e6);
  EXPECT_NEAR(static_cast<double>(language), 10.5e6, 0.07 * 10.5e6);
}

TEST(OpGraphCostTest, EveryStrategyTradesTimeForMemory) {
  for (const std::string& name : SetupNames()) {
    const Job job = *JobFromProto(*MakeSetup(name));
    for (const Module& module : job.modules) {
      for (const LayerGroup& group : module.layers) {
        Shape shape = Items(3, 1000);
        shape.condition_tokens = 300;
        shape.condition_products = 300000;
        const LayerCost cost =
            OpGraphCost().Cost(PlatformOf(job), {group.layer, shape});
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

TEST(OpGraphCostTest, AFrozenLayerHasNoWeightGradientAndKeepsLess) {
  const Job job = JobOf("vlm-s");
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const Platform platform = PlatformOf(job);
  const LayerCost trained =
      OpGraphCost().Cost(platform, {layer, Items(1, 4096)});
  const LayerCost frozen = OpGraphCost().Cost(
      platform, {layer, Items(1, 4096), /*weight_grad=*/false});
  const StrategyCost& keep = frozen[MemoryStrategy::kKeep];
  EXPECT_EQ(keep.weight_grad_ns, 0);
  EXPECT_FALSE(keep.fused_backward_ns.has_value());
  EXPECT_EQ(keep.input_grad_ns, trained[MemoryStrategy::kKeep].input_grad_ns);
  EXPECT_LT(keep.kept_bytes, trained[MemoryStrategy::kKeep].kept_bytes);

  const LayerCost forward = OpGraphCost().Cost(
      platform, {layer, Items(1, 4096), false, /*input_grad=*/false});
  EXPECT_EQ(forward[MemoryStrategy::kKeep].input_grad_ns, 0);
  EXPECT_EQ(forward[MemoryStrategy::kKeep].kept_bytes, 0);
  EXPECT_GT(forward.forward_bytes, 0);
}

TEST(OpGraphCostTest, AttentionGrowsWithSquaresAndHalvesWhenCausal) {
  const Job job = JobOf("vlm-s");
  LayerSpec layer = job.modules[1].layers[1].layer;
  const Platform platform = PlatformOf(job);
  const auto forward = [&](const Shape& shape) {
    return OpGraphCost()
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

TEST(OpGraphCostTest, GpusShareWorkAndMemory) {
  Job job = JobOf("vlm-s");
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const auto cost = [&] {
    return OpGraphCost().Cost(PlatformOf(job), {layer, Items(1, 65536)});
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

TEST(OpGraphCostTest, HugeInputsSaturate) {
  Job job = JobOf("vlm-s");
  job.device.peak_flops_per_second = 1'000'000;
  LayerSpec layer = job.modules[1].layers[1].layer;
  layer.hidden_size = layer.ffn_size = 1 << 24;
  const int64_t n = kMaxMicrobatchTokens;
  const LayerCost cost =
      OpGraphCost().Cost(PlatformOf(job), {layer, {1, n, n * n, n, 0, 0}});
  EXPECT_EQ(cost[MemoryStrategy::kKeep].forward_ns, 100'000'000'000'000);
  EXPECT_LE(cost[MemoryStrategy::kKeep].kept_bytes, 100'000'000'000'000);
}

TEST(OpGraphCostTest, FingerprintsTellFactorsApart) {
  const auto fingerprint = [](const RooflineFactors& factors) {
    return OpGraphCost(std::make_shared<DeviceOpTimes>(factors), nullptr)
        .Fingerprint();
  };
  RooflineFactors factors = DefaultFactors("H800-80GB");
  const std::string first = fingerprint(factors);
  factors[0].launch_ns += 1;
  EXPECT_NE(first, fingerprint(factors));
  EXPECT_NE(first, OpGraphCost().Fingerprint());
}

TEST(DefaultFactorsTest, KnowADeviceByAnyOfItsNames) {
  const auto attention = [](absl::string_view name) {
    return DefaultFactors(name)[static_cast<int>(OpKind::kAttention)]
        .flops_efficiency;
  };
  for (const char* name : {"H20", "h20-96gb", "NVIDIA H20"}) {
    EXPECT_EQ(attention(name), attention("H20-96GB")) << name;
  }
  EXPECT_NE(attention("H200"), attention("H20-96GB"));
}

std::shared_ptr<SubgraphCache> MemoryCache() {
  std::vector<std::unique_ptr<SubgraphStore>> levels;
  levels.push_back(std::make_unique<MemoryStore>(64 << 20));
  return std::make_shared<SubgraphCache>(std::move(levels));
}

// Every layer of every set-up at shapes drawn from one seed, so that set-ups
// with equal modules ask for equal layers.
std::vector<std::pair<Platform, LayerQuery>> ManyQueries() {
  std::vector<std::pair<Platform, LayerQuery>> queries;
  for (const std::string& name : SetupNames()) {
    std::mt19937_64 random(1);
    const Job job = JobOf(name.c_str());
    for (const Module& module : job.modules) {
      for (const LayerGroup& group : module.layers) {
        for (int i = 0; i < 8; ++i) {
          Platform platform = PlatformOf(job);
          platform.parallelism.context_parallel = 1 << random() % 3;
          const auto tokens = static_cast<int64_t>(1 + random() % 20'000);
          Shape shape = {1, tokens, tokens * tokens, tokens, 0, 0};
          shape.condition_tokens = static_cast<int64_t>(random() % 500);
          shape.condition_products = shape.condition_tokens * tokens;
          queries.push_back(
              {platform,
               {group.layer, shape, random() % 2 == 0, random() % 2 == 0}});
        }
      }
    }
  }
  return queries;
}

TEST(OpGraphCostTest, ReuseChangesNothing) {
  const OpGraphCost plain;
  const OpGraphCost reusing(std::make_shared<DeviceOpTimes>(), MemoryCache());
  const auto queries = ManyQueries();
  std::vector<std::string> expected;
  for (const auto& [platform, query] : queries) {
    expected.push_back(EncodeLayerCost(plain.Cost(platform, query)));
    EXPECT_EQ(EncodeLayerCost(reusing.Cost(platform, query)), expected.back());
  }
  const int64_t cold_ops = reusing.ops_simulated();
  EXPECT_GT(cold_ops, 0);
  EXPECT_LT(cold_ops, plain.ops_simulated());  // set-ups share layers
  for (size_t i = 0; i < queries.size(); ++i) {
    EXPECT_EQ(
        EncodeLayerCost(reusing.Cost(queries[i].first, queries[i].second)),
        expected[i]);
  }
  EXPECT_EQ(reusing.ops_simulated(), cold_ops);
}

TEST(OpGraphCostTest, ManyAtOnceCostTheSame) {
  const OpGraphCost plain;
  const OpGraphCost reusing(std::make_shared<DeviceOpTimes>(), MemoryCache());
  const Job job = JobOf("t2v-s");
  std::vector<LayerQuery> queries;
  for (const auto& [platform, query] : ManyQueries()) queries.push_back(query);
  for (const OpGraphCost* model : {&plain, &reusing, &reusing}) {
    const std::vector<LayerCost> costs =
        model->CostAll(PlatformOf(job), queries);
    ASSERT_EQ(costs.size(), queries.size());
    for (size_t i = 0; i < queries.size(); ++i) {
      EXPECT_EQ(EncodeLayerCost(costs[i]),
                EncodeLayerCost(plain.Cost(PlatformOf(job), queries[i])));
    }
  }
}

TEST(OpGraphCostTest, EqualSubgraphsMeetAcrossLayersReplicasAndJobs) {
  const std::shared_ptr<SubgraphCache> cache = MemoryCache();
  const OpGraphCost first(std::make_shared<DeviceOpTimes>(), cache);
  const OpGraphCost second(std::make_shared<DeviceOpTimes>(), cache);
  const Job job = JobOf("vlm-s");
  const LayerSpec layer = job.modules[0].layers[1].layer;
  first.Cost(PlatformOf(job), {layer, Items(1, 1000)});
  const int64_t ops = first.ops_simulated();
  // Other ranks and replicas, a job with another name, links between ranks and
  // memory, items that make the same sums.
  Job other = job;
  other.name = "other";
  other.parallelism.pipeline_parallel = 2;
  other.parallelism.data_parallel = 8;
  other.links.p2p_inter_node.latency_ns += 1;
  other.device.memory_bytes += 1;
  Shape shape = Items(1, 1000);
  shape.items = 2;
  shape.max_tokens = 999;
  second.Cost(PlatformOf(other), {layer, shape});
  EXPECT_EQ(second.ops_simulated(), 0);
  EXPECT_EQ(first.ops_simulated(), ops);
  EXPECT_EQ(cache->counters().levels[0].hits, 1);
}

// More layers than are remembered: each has some 60 operations.
TEST(OpGraphCostTest, ForgottenLayersCostTheSame) {
  const OpGraphCost costs;
  const Job job = JobOf("vlm-s");
  LayerQuery query = {job.modules[1].layers[1].layer, Items(1, 1000)};
  const auto cost_all = [&] {
    std::vector<LayerQuery> queries;
    for (int i = 1; i <= 2500; ++i) {
      query.layer.ffn_size = 64 * i;
      queries.push_back(query);
    }
    return costs.CostAll(PlatformOf(job), queries);
  };
  const std::vector<LayerCost> first = cost_all();
  const std::vector<LayerCost> second = cost_all();
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(EncodeLayerCost(first[i]), EncodeLayerCost(second[i]));
  }
  query.layer.ffn_size = 64;
  EXPECT_EQ(EncodeLayerCost(first[0]),
            EncodeLayerCost(OpGraphCost().Cost(PlatformOf(job), query)));
}

// Whatever changes a cost changes its key, or a cache would answer wrongly.
TEST(OpGraphCostTest, NoChangeOfAPlatformIsAnsweredFromAnotherOnesCosts) {
  const OpGraphCost plain;
  const OpGraphCost reusing(std::make_shared<DeviceOpTimes>(), MemoryCache());
  const Job job = JobOf("t2v-s");
  const LayerQuery query = {job.modules[1].layers[1].layer,
                            {1, 5000, 25'000'000, 5000, 77, 385'000}};
  const std::vector<std::function<void(Platform&)>> changes = {
      [](Platform&) {},
      [](Platform& p) { p.device.name = "A100"; },
      [](Platform& p) { p.device.name = "unknown"; },
      [](Platform& p) { p.device.peak_flops_per_second /= 2; },
      [](Platform& p) { p.device.memory_bandwidth_bytes_per_second /= 2; },
      [](Platform& p) { p.links.tensor_parallel.latency_ns += 10'000; },
      [](Platform& p) {
        p.links.tensor_parallel.bandwidth_bytes_per_second /= 2;
      },
      [](Platform& p) { p.links.gpus_per_node = 2; },
      [](Platform& p) { p.links.host.bandwidth_bytes_per_second /= 2; },
      [](Platform& p) { p.parallelism.tensor_parallel = 2; },
      [](Platform& p) { p.parallelism.context_parallel = 2; },
      [](Platform& p) { p.data_type = DataType::kFp32; },
  };
  for (int round = 0; round < 2; ++round) {
    for (const auto& change : changes) {
      Platform platform = PlatformOf(job);
      change(platform);
      EXPECT_EQ(EncodeLayerCost(reusing.Cost(platform, query)),
                EncodeLayerCost(plain.Cost(platform, query)));
    }
  }
}

// A user's own rule: attention by a table of its own, all else as before.
class FreeAttention : public OpTimeRules {
 public:
  void TimeOps(const Platform& platform, absl::Span<const Op> ops,
               absl::Span<int64_t> op_ns) const override {
    base_.TimeOps(platform, ops, op_ns);
    for (size_t i = 0; i < ops.size(); ++i) {
      if (ops[i].kind == OpKind::kAttention) op_ns[i] = 0;
    }
  }
  std::string Entries(const Platform& platform,
                      const OpKinds& kinds) const override {
    return base_.Entries(platform, kinds) + "free attention";
  }
  std::string Fingerprint() const override {
    return base_.Fingerprint() + " free attention";
  }

 private:
  DeviceOpTimes base_;
};

TEST(OpGraphCostTest, ARuleCanBeOverridden) {
  const std::shared_ptr<SubgraphCache> cache = MemoryCache();
  const OpGraphCost usual(std::make_shared<DeviceOpTimes>(), cache);
  const OpGraphCost own(std::make_shared<FreeAttention>(), cache);
  const Job job = JobOf("vlm-s");
  const LayerQuery query = {job.modules[1].layers[1].layer, Items(1, 8192)};
  const LayerCost a = usual.Cost(PlatformOf(job), query);
  const LayerCost b = own.Cost(PlatformOf(job), query);
  EXPECT_LT(b[MemoryStrategy::kKeep].forward_ns,
            a[MemoryStrategy::kKeep].forward_ns);
  EXPECT_EQ(b[MemoryStrategy::kKeep].weight_grad_ns,
            a[MemoryStrategy::kKeep].weight_grad_ns);
  EXPECT_NE(usual.Fingerprint(), own.Fingerprint());
}

TEST(OpGraphCostTest, CodecRefusesWhatItDidNotWrite) {
  const Job job = JobOf("vlm-s");
  const LayerCost cost = OpGraphCost().Cost(
      PlatformOf(job), {job.modules[0].layers[0].layer, Items(1, 100)});
  const std::string bytes = EncodeLayerCost(cost);
  ASSERT_TRUE(DecodeLayerCost(bytes).has_value());
  EXPECT_EQ(EncodeLayerCost(*DecodeLayerCost(bytes)), bytes);
  EXPECT_FALSE(DecodeLayerCost(bytes.substr(1)).has_value());
  EXPECT_FALSE(DecodeLayerCost("").has_value());
}

}  // namespace
}  // namespace pipeweaver::semu
