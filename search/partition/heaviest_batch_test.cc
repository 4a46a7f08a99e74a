// Against every list of item lengths, and on jobs with inherited items.

#include "search/partition/heaviest_batch.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "gtest/gtest.h"
#include "search/partition/batch_split.h"
#include "search/partition/layout_planner.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/job_proto.h"
#include "semu/model/module_graph.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

int64_t Padded(const std::vector<int64_t>& items,
               const std::vector<int64_t>& buckets) {
  int64_t sum = 0;
  for (const int64_t tokens : items) {
    sum += *std::lower_bound(buckets.begin(), buckets.end(), tokens);
  }
  return sum;
}

// The most that any list of at most `items` lengths is padded to.
int64_t MostPadded(int64_t tokens, int64_t items, int64_t longest,
                   const std::vector<int64_t>& buckets) {
  if (items == 0) return 0;
  int64_t most = 0;
  for (int64_t length = 1;
       length <= std::min({tokens, longest, buckets.back()}); ++length) {
    most = std::max(
        most, Padded({length}, buckets) +
                  MostPadded(tokens - length, items - 1, longest, buckets));
  }
  return most;
}

TEST(MostPaddedItemsTest, NoItemsArePaddedMore) {
  const std::vector<std::vector<int64_t>> some_buckets = {
      {4}, {2, 4, 8}, {1, 7}, {3, 5, 6, 12}};
  for (const std::vector<int64_t>& buckets : some_buckets) {
    for (int64_t tokens = 1; tokens <= 14; ++tokens) {
      for (int64_t items = 1; items <= 5; ++items) {
        const int64_t longest = 4 + tokens % 5;
        const std::vector<int64_t> found =
            MostPaddedItems(tokens, items, longest, buckets);
        EXPECT_LE(*std::max_element(found.begin(), found.end()), longest);
        EXPECT_LE(std::accumulate(found.begin(), found.end(), int64_t{0}),
                  tokens);
        EXPECT_LE(static_cast<int64_t>(found.size()), items);
        EXPECT_EQ(Padded(found, buckets),
                  MostPadded(tokens, items, longest, buckets))
            << tokens << " tokens in " << items << " items, largest bucket "
            << buckets.back();
      }
    }
  }
}

TEST(HeaviestBatchesTest, CanBeSplitWhereModulesInheritItems) {
  for (const std::vector<int64_t>& buckets :
       {std::vector<int64_t>{}, {128}, {512, 1024, 2048}, {2048, 8192}}) {
    v1::Job proto = *semu::MakeSetup("omni");
    for (const int64_t bucket : buckets) {
      proto.mutable_executor()->add_shape_buckets(bucket);
    }
    const semu::Job job = *semu::JobFromProto(proto);
    const semu::Layout layout = *PlanLayout(job, semu::OpGraphCost());
    const std::vector<HeavyBatch> heavy = HeaviestBatches(job, layout);
    EXPECT_GE(heavy.size(), buckets.empty() ? 1 : 4);
    for (const HeavyBatch& some : heavy) {
      const semu::Microbatch& microbatch = some.batch.microbatches[0];
      for (size_t m = 0; m < job.modules.size(); ++m) {
        const std::vector<int64_t>& items = microbatch.item_tokens[m];
        EXPECT_FALSE(items.empty());
        // Rounded up, item by item.
        EXPECT_LE(
            std::accumulate(items.begin(), items.end(), int64_t{0}),
            job.max_microbatch_tokens[m] + static_cast<int64_t>(items.size()));
      }
      for (size_t e = 0; e < job.edges.size(); ++e) {
        const size_t consumers =
            microbatch.item_tokens[job.edges[e].consumer].size();
        for (const semu::ItemUse& use : microbatch.uses[e]) {
          EXPECT_LT(static_cast<size_t>(use.consumer_item), consumers);
        }
      }
      const auto split = SplitBatch(job, layout, some.batch);
      ASSERT_TRUE(split.ok()) << split.status();
      for (size_t m = 0; m < job.modules.size(); ++m) {
        const std::vector<int64_t>& items = microbatch.item_tokens[m];
        if (semu::InheritedEdge(job, static_cast<int>(m)) >= 0) continue;
        EXPECT_LE(*std::max_element(items.begin(), items.end()),
                  2 * layout.modules[m].sub_microbatch_tokens);
        if (some.description != "in items that are padded the most") continue;
        const auto parts = std::count_if(
            split->begin(), split->end(), [m](const SubMicrobatch& sub) {
              return sub.module == static_cast<int>(m);
            });
        EXPECT_EQ(parts, static_cast<int64_t>(items.size()));
      }
    }
  }
}

}  // namespace
}  // namespace pipeweaver::search
