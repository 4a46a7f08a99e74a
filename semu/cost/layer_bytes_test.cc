// The closed rules against the tensors of the layers' graphs.

#include "semu/cost/layer_bytes.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "semu/cost/op_time.h"
#include "semu/graph/layer_expander.h"
#include "semu/graph/pass_simulator.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

int64_t SumOfBytes(const LayerGraph& graph, const std::vector<int>& tensors) {
  int64_t bytes = 0;
  for (const int tensor : tensors) bytes += graph.tensor_bytes[tensor];
  return bytes;
}

TEST(LayerBytesTest, AreThoseOfTheGraphs) {
  for (const std::string& name : SetupNames()) {
    const Job job = *JobFromProto(*MakeSetup(name));
    const Platform platform = PlatformOf(job);
    for (const Module& module : job.modules) {
      for (const LayerGroup& group : module.layers) {
        // The closed rule divides the token ids over the tensor-parallel GPUs,
        // the graph does not, and vocabularies need not divide.
        if (group.layer.kind == LayerKind::kEmbedding ||
            group.layer.kind == LayerKind::kLmHead) {
          continue;
        }
        const LayerQuery query = {
            group.layer, {1, 8192, 8192 * 8192, 8192, 256, 8192 * 256}};
        LayerCost cost;
        SetLayerBytes(platform, query, &cost);
        const LayerGraph graph = ExpandLayer(platform, query);
        for (int s = 0; s < kNumMemoryStrategies; ++s) {
          const auto strategy = static_cast<MemoryStrategy>(s);
          EXPECT_EQ(cost[strategy].kept_bytes,
                    SumOfBytes(graph, KeptTensors(graph, strategy)));
          EXPECT_EQ(cost[strategy].weight_grad_bytes,
                    SumOfBytes(
                        graph,
                        PassOf(graph, PassKind::kWeightGrad, strategy).inputs));
        }
      }
    }
  }
}

TEST(LayerBytesTest, FrozenLayersWithoutAnInputGradientKeepNothing) {
  for (const LayerKind kind : {LayerKind::kEmbedding, LayerKind::kPatchEmbed,
                               LayerKind::kTransformer}) {
    LayerQuery query;
    query.layer = {kind, 64, 256, 8, 8, false, true, 1000, 588};
    query.shape = {1, 128, 128 * 128, 128};
    query.weight_grad = false;
    LayerCost cost;
    SetLayerBytes(Platform(), query, &cost);
    EXPECT_EQ(cost[MemoryStrategy::kKeep].kept_bytes > 0,
              kind == LayerKind::kTransformer);
  }
}

// The simulated peaks of all passes, under every strategy: at most what the
// rules count, and one gathered operand.
TEST(LayerBytesTest, PeaksOfGraphsAreCounted) {
  constexpr int64_t kTokens = 8192;
  constexpr int64_t kTokenIdBytes = 8;
  for (const std::string& name : SetupNames()) {
    const Job job = *JobFromProto(*MakeSetup(name));
    for (const int tp : {1, 4, 8}) {
      Platform platform = PlatformOf(job);
      platform.parallelism.tensor_parallel = tp;
      for (const Module& module : job.modules) {
        for (const LayerGroup& group : module.layers) {
          SCOPED_TRACE(name + " " + module.name + " kind " +
                       std::to_string(static_cast<int>(group.layer.kind)) +
                       " tp " + std::to_string(tp));
          const LayerQuery query = {
              group.layer,
              {1, kTokens, kTokens * kTokens, kTokens, 256, 256 * kTokens}};
          LayerCost cost;
          SetLayerBytes(platform, query, &cost);
          const LayerGraph graph = ExpandLayer(platform, query);
          std::vector<int64_t> op_ns(graph.ops.size());
          DeviceOpTimes().TimeOps(platform, graph.ops, absl::MakeSpan(op_ns));
          const auto peak = [&](PassKind kind, MemoryStrategy strategy) {
            return SimulatePass(graph, PassOf(graph, kind, strategy), op_ns)
                .peak_bytes;
          };
          int64_t more = GatheredBytes(platform, query);
          // Vocabularies need not divide; and as above.
          if (group.layer.kind == LayerKind::kLmHead) more += kTokens * 8;
          if (group.layer.kind == LayerKind::kEmbedding) {
            more += kTokens * kTokenIdBytes;
          }
          EXPECT_LE(
              peak(PassKind::kForward, MemoryStrategy::kKeep),
              cost.forward_bytes + more +
                  (graph.input < 0 ? 0 : graph.tensor_bytes[graph.input]));
          for (int s = 0; s < kNumMemoryStrategies; ++s) {
            const auto strategy = static_cast<MemoryStrategy>(s);
            const StrategyCost& c = cost[strategy];
            for (const PassKind kind :
                 {PassKind::kBackward, PassKind::kInputGrad}) {
              EXPECT_LE(peak(kind, strategy), c.kept_bytes + c.rebuilt_bytes +
                                                  c.workspace_bytes +
                                                  cost.output_bytes + more);
            }
            EXPECT_LE(peak(PassKind::kWeightGrad, strategy),
                      c.weight_grad_bytes + more);
          }
        }
      }
    }
  }
}

TEST(LayerBytesTest, WithoutTensorParallelismNothingIsGathered) {
  const Job job = *JobFromProto(*MakeSetup("vlm-s"));
  Platform platform = PlatformOf(job);
  const LayerQuery query = {job.modules[1].layers[1].layer,
                            {1, 1024, 1024 * 1024, 1024, 0, 0}};
  EXPECT_EQ(GatheredBytes(platform, query), 1024 * 4096 * 2);
  platform.parallelism.context_parallel = 2;
  EXPECT_EQ(GatheredBytes(platform, query), 512 * 4096 * 2);
  platform.parallelism.tensor_parallel = 1;
  EXPECT_EQ(GatheredBytes(platform, query), 0);
}

}  // namespace
}  // namespace pipeweaver::semu
