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

// What the closed rule for the workspace leaves out: the simulated peak of a
// block's backward in one piece passes all that the rule counts, and the
// output's gradient, by no more than the largest operand gathered.
TEST(LayerBytesTest, ABlocksPeakIsThatOfItsGraphButForWhatIsGathered) {
  for (const std::string& name : SetupNames()) {
    const Job job = *JobFromProto(*MakeSetup(name));
    const Platform platform = PlatformOf(job);
    for (const Module& module : job.modules) {
      for (const LayerGroup& group : module.layers) {
        if (group.layer.kind != LayerKind::kTransformer) continue;
        const int64_t n = 8192;
        const LayerQuery query = {group.layer, {1, n, n * n, n, 0, 0}};
        LayerCost cost;
        SetLayerBytes(platform, query, &cost);
        const LayerGraph graph = ExpandLayer(platform, query);
        std::vector<int64_t> op_ns(graph.ops.size());
        DeviceOpTimes().TimeOps(platform, graph.ops, absl::MakeSpan(op_ns));
        const int64_t peak = SimulatePass(graph,
                                          PassOf(graph, PassKind::kBackward,
                                                 MemoryStrategy::kKeep),
                                          op_ns)
                                 .peak_bytes;
        const StrategyCost& keep = cost[MemoryStrategy::kKeep];
        const int64_t gathered = n * group.layer.hidden_size * 2;
        EXPECT_LE(peak, keep.kept_bytes + keep.workspace_bytes +
                            cost.output_bytes + gathered)
            << name << " " << module.name;
      }
    }
  }
}

}  // namespace
}  // namespace pipeweaver::semu
