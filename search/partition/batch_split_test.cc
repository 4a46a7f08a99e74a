// Splits are complete, even and deterministic.
//
// testdata/batch_split.json holds splits of many short items, which the twin in
// client_agents/python is tested on as well. To write it anew:
//   PIPEWEAVER_UPDATE=$PWD/search/partition/testdata/batch_split.json
//       bazel-bin/search/partition/batch_split_test
// (on one line), then look at the difference.

#include "search/partition/batch_split.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/partition/layer_partition.h"
#include "search/testing/golden_file.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

double Largest(const std::vector<double>& weights,
               const std::vector<std::vector<int>>& groups) {
  double largest = 0;
  for (const std::vector<int>& group : groups) {
    double sum = 0;
    for (int i : group) sum += weights[i];
    largest = std::max(largest, sum);
  }
  return largest;
}

// Least largest sum over all divisions into at most `groups`.
double Optimum(const std::vector<double>& weights, int groups) {
  std::vector<double> sums(groups, 0);
  double best = 1e300;
  const auto place = [&](const auto& self, size_t i) -> void {
    if (i == weights.size()) {
      best = std::min(best, *std::max_element(sums.begin(), sums.end()));
      return;
    }
    for (double& sum : sums) {
      sum += weights[i];
      self(self, i + 1);
      sum -= weights[i];
    }
  };
  place(place, 0);
  return best;
}

TEST(SplitItemsTest, CoversItemsAndIsNearTheOptimum) {
  std::mt19937 random(1);
  for (int round = 0; round < 300; ++round) {
    const int count = 1 + static_cast<int>(random() % 8);
    const int groups = 1 + static_cast<int>(random() % std::min(count, 4));
    std::vector<double> weights;
    weights.reserve(count);
    for (int i = 0; i < count; ++i) {
      weights.push_back(
          static_cast<double>(random() % 5 == 0 ? 0 : random() % 100));
    }
    const auto split = SplitItems(weights, groups);
    ASSERT_EQ(split.size(), static_cast<size_t>(groups));
    std::set<int> seen;
    for (const std::vector<int>& group : split) {
      ASSERT_FALSE(group.empty());
      EXPECT_TRUE(std::is_sorted(group.begin(), group.end()));
      seen.insert(group.begin(), group.end());
    }
    EXPECT_EQ(seen.size(), static_cast<size_t>(count));
    EXPECT_TRUE(std::is_sorted(split.begin(), split.end()));
    // Longest first is within 4/3 of the optimum (Graham 1969); runs may cost
    // 5 % more.
    EXPECT_LE(Largest(weights, split),
              1.05 * 4 / 3 * Optimum(weights, groups) + 1e-9);
  }
}

TEST(SplitItemsTest, PrefersNeighbours) {
  EXPECT_THAT(
      SplitItems({5, 5, 5, 5, 5, 5}, 3),
      ElementsAre(ElementsAre(0, 1), ElementsAre(2, 3), ElementsAre(4, 5)));
  EXPECT_THAT(SplitItems({9, 9, 1, 1}, 2),
              ElementsAre(ElementsAre(0, 2), ElementsAre(1, 3)));
}

semu::Job JobOf(const char* name) {
  return *semu::JobFromProto(*semu::MakeSetup(name));
}

semu::Layout SizesOnly(const std::vector<int64_t>& tokens) {
  semu::Layout layout;
  for (int64_t n : tokens) layout.modules.push_back({{}, n});
  return layout;
}

TEST(SplitBatchTest, CountsByTokensAtMostOneAnItem) {
  const semu::Job job = JobOf("vlm-s");
  semu::Batch batch;
  batch.microbatches.resize(2);
  batch.microbatches[0].item_tokens = {{1000, 1000, 1000, 1000, 1000}, {9000}};
  batch.microbatches[0].uses.resize(1);
  batch.microbatches[1].item_tokens = {{}, {100, 100}};
  batch.microbatches[1].uses.resize(1);
  const auto split = SplitBatch(job, SizesOnly({2000, 8192}), batch);
  ASSERT_TRUE(split.ok());
  // 5 / 2 rounded up, then one sample that cannot be divided, then both
  // samples.
  ASSERT_EQ(split->size(), 5u);
  EXPECT_EQ((*split)[0].tokens + (*split)[1].tokens + (*split)[2].tokens, 5000);
  EXPECT_EQ((*split)[3].tokens, 9000);
  EXPECT_THAT((*split)[4].items, ElementsAre(0, 1));
  EXPECT_EQ((*split)[4].microbatch, 1);
}

TEST(SplitBatchTest, ModulesWithoutModalityFollowTheirProducer) {
  const semu::Job job = JobOf("omni");
  semu::Batch batch;
  batch.microbatches.resize(1);
  batch.microbatches[0].item_tokens = {
      {}, {900, 100, 800}, {225, 25, 200}, {700}, {}};
  batch.microbatches[0].uses.resize(4);
  const auto split =
      SplitBatch(job, SizesOnly({1000, 1000, 50, 8192, 1000}), batch);
  ASSERT_TRUE(split.ok());
  ASSERT_EQ(split->size(), 5u);
  EXPECT_EQ((*split)[0].items, (*split)[2].items);
  EXPECT_EQ((*split)[1].items, (*split)[3].items);
  EXPECT_EQ((*split)[2].module, 2);
}

TEST(SplitBatchTest, ShapeBucketsBoundAndPad) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_executor()->add_shape_buckets(2048);
  proto.mutable_executor()->add_shape_buckets(4096);
  const semu::Job job = *semu::JobFromProto(proto);
  semu::Batch batch;
  batch.microbatches.resize(1);
  batch.microbatches[0].item_tokens = {{}, {3000, 3000, 1000}};
  batch.microbatches[0].uses.resize(1);
  const auto split = SplitBatch(job, SizesOnly({9999, 9999}), batch);
  ASSERT_TRUE(split.ok());
  ASSERT_EQ(split->size(), 2u);
  const semu::Shape shape = ShapesOf(job, batch, *split)[0];
  EXPECT_EQ(shape.tokens, 4096);
  batch.microbatches[0].item_tokens[1][2] = 4097;
  const auto refused = SplitBatch(job, SizesOnly({9999, 9999}), batch);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(refused.status().message(),
              HasSubstr("item 2 of module \"backbone\" has 4097 tokens"));
}

std::string ToJson(const google::protobuf::Message& message) {
  std::string text;
  EXPECT_TRUE(google::protobuf::util::MessageToJsonString(message, &text).ok());
  return text;
}

// Some of these fall into other groups where the arithmetic of the limits
// changes at all.
TEST(SplitBatchTest, EqualsTheVectors) {
  constexpr char kVectors[] = "search/partition/testdata/batch_split.json";
  struct Items {
    int seed, count, least, most;  // tokens from least to most
  };
  constexpr Items kTexts[] = {
      {53, 341, 5, 40}, {106, 341, 5, 40}, {128, 341, 5, 40}, {1, 341, 5, 40},
      {2, 120, 5, 40},  {3, 100, 1, 400},  {4, 60, 300, 500}};
  v1::Job job_proto = *semu::MakeSetup("vlm-s");
  const semu::Job job = *semu::JobFromProto(job_proto);
  const semu::Layout layout = SizesOnly({4096, 512});
  for (size_t m = 0; m < layout.modules.size(); ++m) {
    v1::ModuleLayout& module = *job_proto.mutable_layout()->add_modules();
    module.set_module(job.modules[m].name);
    module.set_sub_microbatch_tokens(layout.modules[m].sub_microbatch_tokens);
  }
  v1::BatchMetadata batch_proto;
  for (const Items& texts : kTexts) {
    std::mt19937 random(texts.seed);
    v1::Microbatch& microbatch = *batch_proto.add_microbatches();
    v1::ModuleItems& text = *microbatch.add_items();
    text.set_module(1);
    for (int i = 0; i < texts.count; ++i) {
      text.add_tokens(texts.least + random() % (texts.most - texts.least + 1));
    }
    // An image in each text, of 16 tokens for one there.
    v1::ModuleItems& images = *microbatch.add_items();
    v1::ItemUses& uses = *microbatch.add_uses();
    for (int i = 0; i < texts.count; ++i) {
      images.add_tokens(1 + random() % (16 * text.tokens(i)));
      uses.add_producer_item(i);
      uses.add_consumer_item(i);
    }
  }
  const auto batch = semu::BatchFromProto(batch_proto, job);
  ASSERT_TRUE(batch.ok()) << batch.status();
  const auto split = SplitBatch(job, layout, *batch);
  ASSERT_TRUE(split.ok()) << split.status();
  // [module, microbatch, items]
  const std::string subs = absl::StrJoin(
      *split, ",\n", [](std::string* out, const SubMicrobatch& sub) {
        absl::StrAppend(out, "[", sub.module, ",", sub.microbatch, ",[",
                        absl::StrJoin(sub.items, ","), "]]");
      });
  const std::string vectors = absl::StrCat(
      "{\"job\":", ToJson(job_proto), ",\n\"batch\":", ToJson(batch_proto),
      ",\n\"sub_microbatches\":[\n", subs, "\n]}\n");
  EXPECT_TRUE(testing::GoldenText(kVectors, vectors) == vectors)
      << kVectors << " differs";
}

TEST(ShapeOfTest, ConditionsCountByItem) {
  const semu::Job job = JobOf("t2v-s");
  semu::Batch batch;
  batch.microbatches.resize(1);
  batch.microbatches[0].item_tokens = {{10, 20}, {100, 200}};
  batch.microbatches[0].uses = {{{0, 0}, {1, 1}, {0, 1}}};
  SubMicrobatch sub;
  sub.module = 1;
  sub.items = {0, 1};
  const semu::Shape shape = ShapesOf(job, batch, {sub})[0];
  EXPECT_EQ(shape.condition_tokens, 40);
  EXPECT_EQ(shape.condition_products, 10 * 100 + 30 * 200);
  EXPECT_EQ(shape.sum_squares, 50000);
}

TEST(PartitionLayersTest, IsOptimal) {
  std::mt19937 random(2);
  for (int round = 0; round < 200; ++round) {
    const int n = 1 + static_cast<int>(random() % 9);
    const int chunks = 1 + static_cast<int>(random() % 4);
    std::vector<int64_t> weights;
    weights.reserve(n);
    for (int i = 0; i < n; ++i) weights.push_back(random() % 10);
    const std::vector<int> lengths = PartitionLayers(weights, chunks);
    ASSERT_EQ(lengths.size(), static_cast<size_t>(chunks));
    const auto largest_of = [&](const std::vector<int>& cut) {
      int64_t largest = 0;
      int i = 0;
      for (int length : cut) {
        int64_t sum = 0;
        for (int k = 0; k < length; ++k) sum += weights[i++];
        largest = std::max(largest, sum);
      }
      EXPECT_EQ(i, n);
      return largest;
    };
    int64_t best = 1 << 30;
    std::vector<int> cut(chunks, 0);
    const auto all = [&](const auto& self, int c, int left) -> void {
      if (c == chunks - 1) {
        cut[c] = left;
        best = std::min(best, largest_of(cut));
        return;
      }
      for (cut[c] = 0; cut[c] <= left; ++cut[c]) {
        const int mine = cut[c];
        self(self, c + 1, left - mine);
        cut[c] = mine;
      }
    };
    all(all, 0, n);
    EXPECT_EQ(largest_of(lengths), best);
  }
}

TEST(PartitionLayersTest, KeepsWithinSizes) {
  // By weight alone, the last three would stand together.
  const std::vector<int64_t> weights = {9, 3, 3, 3};
  EXPECT_THAT(PartitionLayers(weights, 2), ElementsAre(1, 3));
  EXPECT_THAT(*PartitionLayersWithin(weights, 2, {1, 4, 4, 4}, 9),
              ElementsAre(2, 2));
  EXPECT_FALSE(PartitionLayersWithin(weights, 2, {1, 4, 4, 4}, 6).has_value());
  EXPECT_FALSE(PartitionLayersWithin(weights, 4, {1, 4, 4, 4}, 3).has_value());
}

TEST(PartitionLayersTest, ManyLayersStayQuick) {
  const std::vector<int64_t> weights(100000, 7);
  const std::vector<int> lengths = PartitionLayers(weights, 1000);
  EXPECT_EQ(lengths.size(), 1000u);
  EXPECT_EQ(*std::max_element(lengths.begin(), lengths.end()), 100);
}

TEST(PartitionLayersTest, RestIsEvenToo) {
  EXPECT_THAT(PartitionLayers({9, 1, 1, 1, 1, 1, 1}, 4),
              ElementsAre(1, 2, 2, 2));
  EXPECT_THAT(PartitionLayers({1, 1, 1, 1, 1}, 3), ElementsAre(2, 2, 1));
  EXPECT_THAT(PartitionLayers({4}, 3), ElementsAre(1, 0, 0));
}

}  // namespace
}  // namespace pipeweaver::search
