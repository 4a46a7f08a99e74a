#include "search/strategy/memory_ways.h"

#include <gtest/gtest.h>

#include <vector>

#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/testing/plain_choice.h"

namespace pipeweaver::search {
namespace {

// One sweep over three ranks, each stage with 100 bytes kept or 40 for 6 ns.
ProblemGraph ThreeRanks() {
  Problem problem;
  problem.ranks = 3;
  problem.memory_limit_bytes.assign(3, 1000);
  Sweep sweep;
  for (int r = 0; r < 3; ++r) {
    sweep.stages.push_back(
        {.rank = r,
         .transfer_ns = 5,
         .choices = {PlainChoice(20, 100), PlainChoice(26, 40)}});
  }
  problem.sweeps = {sweep};
  return BuildProblemGraph(problem);
}

TEST(HoldWeightsTest, GrowWithThePathFromForwardToBackward) {
  const std::vector<double> weights = HoldWeights(ThreeRanks());
  // Held for 110, 70 and 30 ns, and as long again each for waiting.
  ASSERT_EQ(weights.size(), 3u);
  EXPECT_NEAR(weights[0] - weights[1], weights[1] - weights[2], 1e-9);
  EXPECT_NEAR((weights[0] - weights[1]) / (weights[0] - weights[2]), 0.5, 1e-9);
  EXPECT_GT(weights[2], 30.0 / 70);
}

TEST(MemoryPricesTest, MemoryIsGivenUpFirstWhereItIsHeldLongest) {
  const ProblemGraph graph = ThreeRanks();
  const std::vector<double> weights = HoldWeights(graph);
  // 6 ns for 60 bytes: worth it where price * weight is over 0.1.
  const auto choices_at = [&](double price) {
    return MemoryPrices(graph).AllAt(weights, price).choice;
  };
  EXPECT_EQ(choices_at(0), (std::vector<int32_t>{0, 0, 0}));
  EXPECT_EQ(choices_at(0.101 / weights[0]), (std::vector<int32_t>{1, 0, 0}));
  EXPECT_EQ(choices_at(0.101 / weights[1]), (std::vector<int32_t>{1, 1, 0}));
  EXPECT_EQ(choices_at(0.101 / weights[2]), (std::vector<int32_t>{1, 1, 1}));
}

TEST(MemoryPricesTest, TypicalOnesLeadFromTheFastestToTheLeanest) {
  const ProblemGraph graph = ThreeRanks();
  const std::vector<double> weights = HoldWeights(graph);
  const std::vector<double> prices = MemoryPrices(graph).Typical(weights, 8);
  EXPECT_EQ(prices.front(), 0);
  EXPECT_EQ(MemoryPrices(graph).AllAt(weights, prices.back()).choice,
            (std::vector<int32_t>{1, 1, 1}));
  for (size_t i = 1; i < prices.size(); ++i) {
    EXPECT_GT(prices[i], prices[i - 1]);
  }
}

}  // namespace
}  // namespace pipeweaver::search
