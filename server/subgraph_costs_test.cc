#include "server/subgraph_costs.h"

#include <prometheus/text_serializer.h>
#include <unistd.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"
#include "server/config.h"

namespace pipeweaver::server {
namespace {

using ::testing::HasSubstr;

void CostALayer(const semu::OpGraphCost& costs) {
  const semu::Job job = *semu::JobFromProto(*semu::MakeSetup("vlm-s"));
  costs.Cost(semu::PlatformOf(job),
             {job.modules[0].layers[1].layer, {1, 100, 10'000, 100, 0, 0}});
}

std::string Page(const SubgraphMetrics& metrics) {
  return prometheus::TextSerializer().Serialize(metrics.Collect());
}

TEST(SubgraphCostsTest, CountsHitsByLevelAcrossARestart) {
  v1::ServerConfig config;
  config.set_subgraph_store_file(absl::StrCat(
      ::testing::TempDir(), "/subgraphs.", static_cast<int64_t>(getpid())));
  config = *CompleteConfig(config);
  {
    const auto made = MakeSubgraphCosts(config);
    ASSERT_TRUE(made.ok()) << made.status();
    CostALayer(*made->costs);
    CostALayer(*made->costs);
    const std::string page = Page(*made->metrics);
    EXPECT_THAT(
        page, HasSubstr("pipeweaver_subgraph_hits_total{level=\"memory\"} 1"));
    EXPECT_THAT(page,
                HasSubstr("pipeweaver_subgraph_hits_total{level=\"file\"} 0"));
    EXPECT_THAT(page, HasSubstr("pipeweaver_subgraph_misses_total 1"));
    EXPECT_GT(made->costs->ops_simulated(), 0);
  }
  const auto again = MakeSubgraphCosts(config);
  ASSERT_TRUE(again.ok()) << again.status();
  CostALayer(*again->costs);
  const std::string page = Page(*again->metrics);
  EXPECT_THAT(page,
              HasSubstr("pipeweaver_subgraph_hits_total{level=\"file\"} 1"));
  EXPECT_THAT(page, HasSubstr("pipeweaver_subgraph_misses_total 0"));
  EXPECT_THAT(page, HasSubstr("pipeweaver_ops_simulated_total 0"));
}

TEST(SubgraphCostsTest, NamesTheFieldOfAFileThatCannotBeOpened) {
  v1::ServerConfig config = *CompleteConfig({});
  config.set_subgraph_store_file(::testing::TempDir());
  const auto made = MakeSubgraphCosts(config);
  EXPECT_EQ(made.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(made.status().message()),
              HasSubstr("subgraph_store_file: '"));
}

TEST(SubgraphCostsTest, ARedisThatIsAwayIsNoError) {
  v1::ServerConfig config;
  config.set_subgraph_store_redis("unix:/nonexistent/redis");
  const auto made = MakeSubgraphCosts(*CompleteConfig(config));
  ASSERT_TRUE(made.ok()) << made.status();
  CostALayer(*made->costs);
  EXPECT_THAT(Page(*made->metrics),
              HasSubstr("pipeweaver_subgraph_misses_total 1"));
  EXPECT_THAT(Page(*made->metrics),
              HasSubstr("pipeweaver_subgraph_redis_up 0"));
}

}  // namespace
}  // namespace pipeweaver::server
