#include "search/strategy/annealing.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>

namespace pipeweaver::search {
namespace {

TEST(AnnealingTest, WorseIsBorneByMetropolisRule) {
  constexpr int kDraws = 100'000;
  constexpr int64_t kMakespanNs = 1'000'000'000;
  std::mt19937_64 random(1);
  double sum_ns = 0;
  int longer = 0, twice_longer = 0;
  for (int i = 0; i < kDraws; ++i) {
    const int64_t bearable_ns = BearableNs(kMakespanNs, 0.004, random);
    ASSERT_GE(bearable_ns, kMakespanNs);
    sum_ns += static_cast<double>(bearable_ns - kMakespanNs);
    longer += bearable_ns >= kMakespanNs + 4'000'000;
    twice_longer += bearable_ns >= kMakespanNs + 8'000'000;
  }
  EXPECT_NEAR(sum_ns / kDraws, 4'000'000, 60'000);
  EXPECT_NEAR(1.0 * longer / kDraws, 0.3679, 0.006);
  EXPECT_NEAR(1.0 * twice_longer / kDraws, 0.1353, 0.006);
}

TEST(AnnealingTest, NothingWorseIsBorneCold) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(BearableNs(123, 0, random), 123);
}

}  // namespace
}  // namespace pipeweaver::search
