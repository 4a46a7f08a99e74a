// Sizes of the paper's models, bytes under sharding, and placement on nodes.

#include "semu/cost/weight_memory.h"

#include "gtest/gtest.h"
#include "semu/cost/links.h"
#include "semu/model/job_proto.h"
#include "semu/model/layer_size.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

Job JobOf(const char* name) { return *JobFromProto(*MakeSetup(name)); }

double Billions(const Module& module) {
  double parameters = 0;
  for (const LayerGroup& group : module.layers) {
    parameters +=
        static_cast<double>(ParameterCount(group.layer)) * group.count;
  }
  return parameters / 1e9;
}

TEST(LayerSizeTest, ModelsHaveTheirPublishedSizes) {
  EXPECT_NEAR(Billions(JobOf("vlm-s").modules[0]), 5, 0.8);
  EXPECT_NEAR(Billions(JobOf("vlm-s").modules[1]), 8.03, 0.01);
  EXPECT_NEAR(Billions(JobOf("vlm-m").modules[1]), 32.8, 0.1);
  EXPECT_NEAR(Billions(JobOf("vlm-l").modules[0]), 22, 0.3);
  EXPECT_NEAR(Billions(JobOf("vlm-l").modules[1]), 72.7, 0.1);
  EXPECT_NEAR(Billions(JobOf("vlm-xl").modules[1]), 175, 1);
  EXPECT_NEAR(Billions(JobOf("t2v-s").modules[1]), 5, 0.2);
  EXPECT_NEAR(Billions(JobOf("t2v-l").modules[1]), 29, 0.3);
}

TEST(WeightMemoryTest, BytesAParameter) {
  Job job = JobOf("omni");  // 4-way tensor parallel, 2 replicas
  LayerSpec layer;
  layer.kind = LayerKind::kProjector;
  layer.hidden_size = layer.ffn_size = layer.input_size = 100;  // 20000
  WeightMemory memory = WeightMemoryOf(job, layer, true);
  EXPECT_EQ(memory.weight_bytes, 5000 * 2);
  EXPECT_EQ(memory.gradient_bytes, 5000 * 4);
  EXPECT_EQ(memory.optimizer_bytes, 2500 * 12);
  job.optimizer_sharding = OptimizerSharding::kNone;
  EXPECT_EQ(WeightMemoryOf(job, layer, true).Total(), 5000 * 18);
  job.optimizer_sharding = OptimizerSharding::kStatesAndGradients;
  EXPECT_EQ(WeightMemoryOf(job, layer, true).Total(), 5000 * 2 + 2500 * 16);
  EXPECT_EQ(WeightMemoryOf(job, layer, false).Total(), 5000 * 2);
  job.data_type = DataType::kFp32;
  EXPECT_EQ(WeightMemoryOf(job, layer, true).Total(), 5000 * 4 + 2500 * 12);
}

TEST(LinksTest, RanksOnOneNodeUseTheFasterLink) {
  const Job small = JobOf("vlm-s");  // 4 GPUs a rank, 8 a node
  const auto intra = [](const Job& job, int from, int to) {
    return &P2pLink(job.parallelism, job.links, from, to) ==
           &job.links.p2p_intra_node;
  };
  EXPECT_TRUE(intra(small, 0, 1));
  EXPECT_FALSE(intra(small, 1, 2));
  EXPECT_TRUE(intra(small, 3, 2));
  const Job replicated = JobOf("omni");  // the replicas stand between the ranks
  EXPECT_FALSE(intra(replicated, 0, 1));
}

TEST(LinksTest, TransferTime) {
  EXPECT_EQ(TransferNs({5000, 25'000'000'000}, 25'000'000), 1'005'000);
  EXPECT_EQ(TransferNs({5000, 1'000'000'000'000}, 1), 5001);
  EXPECT_EQ(TransferNs({0, 1'000'000}, 0), 0);
}

}  // namespace
}  // namespace pipeweaver::semu
