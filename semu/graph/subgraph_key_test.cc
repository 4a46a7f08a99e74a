// Vectors of the key's layout, and which queries share a key.

#include "semu/graph/subgraph_key.h"

#include <set>
#include <string>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

std::string Digest() { return std::string(kEntriesDigestBytes, '\xab'); }

Platform TestPlatform() {
  Platform platform;
  platform.parallelism = {4, 8, 2, 16};
  platform.data_type = DataType::kBf16;
  return platform;
}

LayerQuery BlockQuery(LayerKind kind) {
  LayerQuery query;
  query.layer = {kind, 4096, 14336, 32, 8, true, true, 128256, 588};
  query.shape = {3, 1000, 500'000, 700, 77, 60'000};
  return query;
}

// Sixteen hexadecimal digits an integer.
TEST(SubgraphKeyTest, ATransformersVector) {
  EXPECT_EQ(absl::BytesToHexString(SubgraphKey(
                TestPlatform(), BlockQuery(LayerKind::kTransformer), Digest())),
            "5057534702000000"
            "0000000000000000"
            "0010000000000000"
            "0038000000000000"
            "2000000000000000"
            "0800000000000000"
            "0100000000000000"
            "0100000000000000"
            "0000000000000000"
            "0000000000000000"
            "0100000000000000"
            "0100000000000000"
            "0400000000000000"
            "0200000000000000"
            "0000000000000000"
            "e803000000000000"
            "20a1070000000000"
            "0000000000000000"
            "0000000000000000"
            "abababababababababababababababababababababababababababababababab");
}

TEST(SubgraphKeyTest, APatchEmbeddingsVector) {
  LayerQuery query = BlockQuery(LayerKind::kPatchEmbed);
  query.weight_grad = false;
  EXPECT_EQ(
      absl::BytesToHexString(SubgraphKey(TestPlatform(), query, Digest())),
      "5057534702000000"
      "0400000000000000"
      "0010000000000000"
      "0000000000000000"
      "0000000000000000"
      "0000000000000000"
      "0000000000000000"
      "0000000000000000"
      "0000000000000000"
      "4c02000000000000"
      "0000000000000000"
      "0000000000000000"
      "0400000000000000"
      "0200000000000000"
      "0000000000000000"
      "e803000000000000"
      "0000000000000000"
      "0000000000000000"
      "0000000000000000"
      "abababababababababababababababababababababababababababababababab");
}

TEST(SubgraphKeyTest, WhatDoesNotMatterDoesNotTell) {
  const LayerQuery query = BlockQuery(LayerKind::kTransformer);
  const std::string key = SubgraphKey(TestPlatform(), query, Digest());
  Platform elsewhere = TestPlatform();
  elsewhere.parallelism.pipeline_parallel = 2;
  elsewhere.parallelism.data_parallel = 1;
  EXPECT_EQ(SubgraphKey(elsewhere, query, Digest()), key);
  LayerQuery other = query;
  other.shape.items = 9;
  other.shape.max_tokens = 999;
  other.shape.condition_tokens = 1;
  other.layer.vocab_size = 7;
  EXPECT_EQ(SubgraphKey(TestPlatform(), other, Digest()), key);
}

TEST(SubgraphKeyTest, WhatMattersTells) {
  const LayerQuery query = BlockQuery(LayerKind::kDit);
  std::set<std::string> keys = {SubgraphKey(TestPlatform(), query, Digest())};
  const auto add = [&](const Platform& platform, const LayerQuery& changed,
                       const std::string& digest) {
    EXPECT_TRUE(keys.insert(SubgraphKey(platform, changed, digest)).second);
  };
  for (int64_t LayerSpec::*field :
       {&LayerSpec::hidden_size, &LayerSpec::ffn_size}) {
    LayerQuery changed = query;
    ++(changed.layer.*field);
    add(TestPlatform(), changed, Digest());
  }
  for (int64_t Shape::*field :
       {&Shape::tokens, &Shape::sum_squares, &Shape::condition_tokens,
        &Shape::condition_products}) {
    LayerQuery changed = query;
    ++(changed.shape.*field);
    add(TestPlatform(), changed, Digest());
  }
  for (bool LayerQuery::*field :
       {&LayerQuery::weight_grad, &LayerQuery::input_grad}) {
    LayerQuery changed = query;
    changed.*field = false;
    add(TestPlatform(), changed, Digest());
  }
  for (int Parallelism::*field :
       {&Parallelism::tensor_parallel, &Parallelism::context_parallel}) {
    Platform changed = TestPlatform();
    ++(changed.parallelism.*field);
    add(changed, query, Digest());
  }
  Platform fp32 = TestPlatform();
  fp32.data_type = DataType::kFp32;
  add(fp32, query, Digest());
  add(TestPlatform(), query, std::string(kEntriesDigestBytes, 'b'));
}

}  // namespace
}  // namespace pipeweaver::semu
