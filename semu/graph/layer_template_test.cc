// Sizes that can be worked out by hand, and that shapes change nothing else.

#include "semu/graph/layer_template.h"

#include <vector>

#include "gtest/gtest.h"
#include "semu/graph/layer_expander.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

// A matmul and an attention on 2 context-parallel by 4 tensor-parallel GPUs.
LayerTemplate MakeTemplate() {
  LayerTemplate layer;
  layer.tensor_parallel = 4;
  layer.context_parallel = 2;
  layer.causal = true;
  layer.graph.tensor_bytes = {0, 0, 0};
  layer.tensor_rules = {{.fixed = 7, .per_row = {2, 0, 0}},
                        {.per_row = {0, 3, 0}},
                        {.per_row = {0, 0, 5}}};
  Op matmul;
  matmul.kind = OpKind::kMatmul;
  matmul.inner = 16;
  matmul.columns = 32;
  Op attention;
  attention.kind = OpKind::kAttention;
  layer.graph.ops = {matmul, attention};
  layer.op_rules = {
      {.bytes = layer.tensor_rules[0] + layer.tensor_rules[1],
       .row_dimension = &Op::rows,
       .rows = RowKind::kShard},
      {.bytes = layer.tensor_rules[2], .width = 8, .factor = 2.5}};
  return layer;
}

TEST(LayerTemplateTest, SizesFollowTheShape) {
  // 50 tokens of one context-parallel GPU, 13 of one GPU; 6 of the condition.
  const Shape shape = {1, 100, 10'000, 100, 11, 1100};
  const LayerGraph graph = MakeTemplate().GraphAt(shape);
  EXPECT_EQ(graph.tensor_bytes, (std::vector<int64_t>{107, 39, 30}));
  const Op& matmul = graph.ops[0];
  EXPECT_EQ(matmul.rows, 13);
  EXPECT_EQ(matmul.inner, 16);
  EXPECT_EQ(matmul.flops, 2 * 13 * 16 * 32);
  EXPECT_EQ(matmul.bytes, 107 + 39);
  // Half of the pairs, on 2 GPUs, in 2 blocks.
  EXPECT_EQ(graph.ops[1].flops, 2.5 * 4 * 8 * 10'000 / 2 / 2 / 2);
  EXPECT_EQ(graph.ops[1].bytes, 30);
}

TEST(LayerTemplateTest, AConditionHasItsOwnPairs) {
  LayerTemplate layer = MakeTemplate();
  layer.op_rules[1].of_condition = true;
  std::vector<Op> ops;
  layer.SetOpsAt({1, 100, 10'000, 100, 11, 1100}, &ops);
  EXPECT_EQ(ops[1].flops, 2.5 * 4 * 8 * 1100 / 2 / 2);
}

TEST(LayerTemplateTest, BytesAreBounded) {
  constexpr int64_t kMost = 100'000'000'000'000;
  const LayerGraph graph =
      MakeTemplate().GraphAt({1, kMost, 0, kMost, kMost, 0});
  EXPECT_EQ(graph.tensor_bytes[0], kMost);
  EXPECT_EQ(graph.ops[0].bytes, kMost);
}

TEST(LayerTemplateTest, AllShapesShareTheOperations) {
  const Job job = *JobFromProto(*MakeSetup("t2v-s"));
  const Platform platform = PlatformOf(job);
  const LayerSpec layer = job.modules[1].layers[1].layer;
  const LayerTemplate any = ExpandTemplate(platform, layer, true, true);
  const Shape empty;
  const Shape shape = {1, 5000, 25'000'000, 5000, 77, 385'000};
  for (const Shape& s : {empty, shape}) {
    const LayerGraph graph = ExpandLayer(platform, {layer, s});
    EXPECT_EQ(graph.forward, any.graph.forward);
    EXPECT_EQ(graph.backward, any.graph.backward);
    EXPECT_EQ(graph.saved, any.graph.saved);
    EXPECT_EQ(graph.saved_selectively, any.graph.saved_selectively);
    EXPECT_EQ(graph.ops.size(), any.graph.ops.size());
  }
}

}  // namespace
}  // namespace pipeweaver::semu
