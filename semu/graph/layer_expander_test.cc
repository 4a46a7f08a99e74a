// What must hold of every layer's graph, and counts that can be worked out by
// hand.

#include "semu/graph/layer_expander.h"

#include <functional>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "semu/graph/subgraph_key.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

Job JobOf(const std::string& name) { return *JobFromProto(*MakeSetup(name)); }

Shape TestShape() { return {3, 3000, 3'000'000, 1000, 300, 300'000}; }

// All layers of all set-ups under several ways of parallelism, with and without
// their gradients.
void ForEachLayer(
    const std::function<void(const Platform&, const LayerQuery&)>& visit) {
  for (const std::string& name : SetupNames()) {
    const Job job = JobOf(name);
    for (const auto& [tp, cp] :
         {std::pair(1, 1), std::pair(8, 1), std::pair(1, 4), std::pair(4, 2)}) {
      Platform platform = PlatformOf(job);
      platform.parallelism.tensor_parallel = tp;
      platform.parallelism.context_parallel = cp;
      for (const Module& module : job.modules) {
        for (const LayerGroup& group : module.layers) {
          for (const bool weight_grad : {false, true}) {
            for (const bool input_grad : {false, true}) {
              visit(platform,
                    {group.layer, TestShape(), weight_grad, input_grad});
            }
          }
        }
      }
    }
  }
}

TEST(LayerExpanderTest, PassesReadOnlyWhatIsThere) {
  ForEachLayer([](const Platform& platform, const LayerQuery& query) {
    const LayerGraph graph = ExpandLayer(platform, query);
    for (int k = 0; k < kNumPassKinds; ++k) {
      for (int s = 0; s < kNumMemoryStrategies; ++s) {
        const Pass pass = PassOf(graph, static_cast<PassKind>(k),
                                 static_cast<MemoryStrategy>(s));
        std::set<int> there(pass.inputs.begin(), pass.inputs.end());
        for (const int index : pass.ops) {
          for (const int tensor : graph.op_tensors[index].reads) {
            if (graph.tensor_bytes[tensor] == 0) continue;
            EXPECT_TRUE(there.count(tensor) > 0) << "pass " << k;
          }
          const auto& writes = graph.op_tensors[index].writes;
          there.insert(writes.begin(), writes.end());
        }
        for (const int tensor : pass.results) {
          if (graph.tensor_bytes[tensor] == 0) continue;
          EXPECT_TRUE(there.count(tensor) > 0) << "result of pass " << k;
        }
      }
    }
  });
}

TEST(LayerExpanderTest, ABackwardIsBothGradients) {
  ForEachLayer([](const Platform& platform, const LayerQuery& query) {
    const LayerGraph graph = ExpandLayer(platform, query);
    std::multiset<int> both(graph.input_grads.begin(), graph.input_grads.end());
    both.insert(graph.weight_grads.begin(), graph.weight_grads.end());
    const std::set<int> distinct(both.begin(), both.end());
    EXPECT_EQ(std::set<int>(graph.backward.begin(), graph.backward.end()),
              distinct);
    if (!query.weight_grad) {
      EXPECT_TRUE(graph.weight_grads.empty());
    }
    if (!query.weight_grad && !query.input_grad) {
      EXPECT_TRUE(graph.backward.empty());
      EXPECT_TRUE(graph.saved.empty());
    }
  });
}

TEST(LayerExpanderTest, KindsAreThoseThatTheKeyCounts) {
  ForEachLayer([](const Platform& platform, const LayerQuery& query) {
    if (!query.weight_grad || !query.input_grad) return;
    const LayerGraph graph = ExpandLayer(platform, query);
    OpKinds kinds;
    for (const Op& op : graph.ops) kinds.set(static_cast<int>(op.kind));
    EXPECT_EQ(kinds, OpKindsOf(query.layer, platform.parallelism));
  });
}

double MatmulFlops(const LayerGraph& graph, const std::vector<int>& ops) {
  double flops = 0;
  for (const int op : ops) {
    if (graph.ops[op].kind == OpKind::kMatmul) flops += graph.ops[op].flops;
  }
  return flops;
}

double AttentionFlops(const LayerGraph& graph, const std::vector<int>& ops) {
  double flops = 0;
  for (const int op : ops) {
    if (graph.ops[op].kind == OpKind::kAttention) flops += graph.ops[op].flops;
  }
  return flops;
}

TEST(LayerExpanderTest, ALanguageLayerDoesTheKnownArithmetic) {
  const Job job = JobOf("vlm-s");  // Llama3 8B, 4 tensor-parallel GPUs
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const double n = 4096;
  const Shape shape = {1, 4096, 4096 * 4096, 4096, 0, 0};
  const LayerGraph graph =
      ExpandLayer(PlatformOf(job), {layer, shape, true, true});
  const double weights =
      4096.0 * (4096 + 2 * 1024) + 4096.0 * 4096 + 3 * 4096.0 * 14336;
  EXPECT_EQ(MatmulFlops(graph, graph.forward), 2 * n * weights / 4);
  EXPECT_EQ(MatmulFlops(graph, graph.input_grads), 2 * n * weights / 4);
  EXPECT_EQ(MatmulFlops(graph, graph.weight_grads), 2 * n * weights / 4);
  // Scores and values, half of them masked.
  const double attention = 4 * (n * n / 2) * 4096 / 4;
  EXPECT_EQ(AttentionFlops(graph, graph.forward), attention);
  EXPECT_EQ(AttentionFlops(graph, graph.input_grads), 2.5 * attention);
}

TEST(LayerExpanderTest, ALanguageLayerKeepsTheKnownTensors) {
  const Job job = JobOf("vlm-s");
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const int64_t n = 4096;
  const LayerGraph graph =
      ExpandLayer(PlatformOf(job), {layer, {1, n, n * n, n, 0, 0}});
  const auto bytes = [&](MemoryStrategy strategy) {
    int64_t sum = 0;
    for (const int tensor : KeptTensors(graph, strategy)) {
      sum += graph.tensor_bytes[tensor];
    }
    return sum;
  };
  // Of one token on one of 4 GPUs: inputs and results of both norms, queries,
  // keys and values, the attention's result, both inputs and the result of the
  // activation, all of 2 bytes; a logarithm of 4 bytes a head.
  const int64_t token = (4 * 4096 + (4096 + 2 * 1024) + 4096 + 3 * 14336) * 2;
  EXPECT_EQ(bytes(MemoryStrategy::kKeep), n * (token + 32 * 4) / 4);
  const int64_t rebuilt = (2 * 4096 + 14336) * 2;
  EXPECT_EQ(bytes(MemoryStrategy::kSelectiveRecompute),
            n * (token - rebuilt + 32 * 4) / 4);
  EXPECT_EQ(bytes(MemoryStrategy::kFullRecompute), n * 4096 * 2 / 4);
  EXPECT_EQ(bytes(MemoryStrategy::kOffload), 0);
}

TEST(LayerExpanderTest, RecomputeRunsTheForwardAgain) {
  const Job job = JobOf("vlm-s");
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const LayerGraph graph = ExpandLayer(PlatformOf(job), {layer, TestShape()});
  const auto ops = [&](MemoryStrategy strategy) {
    return PassOf(graph, PassKind::kBackward, strategy).ops.size();
  };
  EXPECT_EQ(ops(MemoryStrategy::kOffload), ops(MemoryStrategy::kKeep));
  EXPECT_EQ(ops(MemoryStrategy::kSelectiveRecompute),
            ops(MemoryStrategy::kKeep) + 3);  // two norms and the activation
  EXPECT_EQ(ops(MemoryStrategy::kFullRecompute),
            ops(MemoryStrategy::kKeep) + graph.forward.size());
}

TEST(LayerExpanderTest, KeysGoRoundTheRing) {
  const Job job = JobOf("vlm-s");
  Platform platform = PlatformOf(job);
  platform.parallelism.context_parallel = 4;
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const LayerGraph graph = ExpandLayer(platform, {layer, TestShape()});
  const auto moved = [&](const std::vector<int>& ops) {
    int64_t bytes = 0;
    for (const int op : ops) {
      if (graph.ops[op].kind == OpKind::kRingTransfer) {
        bytes += graph.ops[op].bytes;
      }
    }
    return bytes;
  };
  const int64_t block = 750 * (2 * 1024 / 4) * 2;  // of one GPU's tokens
  EXPECT_EQ(moved(graph.forward), 3 * block);
  EXPECT_EQ(moved(graph.input_grads), 2 * 3 * block);
}

}  // namespace
}  // namespace pipeweaver::semu
