// Tests of the op cost rules: what must hold for any device with factors.

#include "semu/cost/ops/op_rules.h"

#include <algorithm>
#include <cmath>
#include <random>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

using ::testing::HasSubstr;

class EveryDevice : public ::testing::TestWithParam<std::string> {
 protected:
  const DeviceFactors& device() const { return *FindDeviceFactors(GetParam()); }
};

TEST_P(EveryDevice, NoMatmulBeatsThePeakOrTheMemory) {
  for (const int64_t rows : {1, 64, 1000, 4096, 131072}) {
    for (const int64_t columns : {1, 512, 2752, 57344}) {
      for (const int64_t inner : {1, 128, 1376, 28672}) {
        const double us = MatmulUs(device(), rows, columns, inner);
        const double flops = 2.0 * rows * columns * inner;
        const double bytes =
            2.0 * (rows * inner + inner * columns + rows * columns);
        EXPECT_GT(us, flops / device().peak_flops_per_s * 1e6);
        EXPECT_GT(us, bytes / device().memory_bytes_per_s * 1e6);
      }
    }
  }
}

// Every tile and split, as the header has it.
double PlainMatmulUs(const DeviceFactors& device, double m, double n,
                     double k) {
  const MatmulFactors& f = device.matmul;
  const double sms = static_cast<double>(device.sm_count);
  const double bytes_per_us = device.memory_bytes_per_s * 1e-6;
  double compute_us = 1e300;
  for (const Tile& tile : kTiles) {
    for (const int split : {1, 2, 4}) {
      const double waves = std::ceil(m / static_cast<double>(tile.rows)) *
                           std::ceil(n / static_cast<double>(tile.columns)) *
                           split / sms;
      double us = (waves <= 1 ? 1
                              : (1 - f.wave_rounding) * waves +
                                    f.wave_rounding * std::ceil(waves)) *
                  (2.0 * static_cast<double>(tile.rows * tile.columns)) *
                  (k / split + f.extra_inner) /
                  (device.peak_flops_per_s * 1e-6 / sms * f.peak_fraction *
                   f.tile_efficiency[tile.size_class]);
      if (split > 1) us += f.split_cost * split * m * n * 4 / bytes_per_us + 1;
      compute_us = std::min(compute_us, us);
    }
  }
  compute_us *=
      1 - f.sustained_slowdown * std::expm1(-compute_us / f.sustained_time_us);
  const double memory_us =
      2 * (m * k + k * n + m * n) / (bytes_per_us * f.bandwidth_fraction);
  return f.launch_us +
         std::sqrt(std::sqrt(compute_us * compute_us * compute_us * compute_us +
                             memory_us * memory_us * memory_us * memory_us));
}

TEST_P(EveryDevice, MatmulsTakeTheBestTileAndSplit) {
  std::mt19937_64 random(1);
  const auto draw = [&random] {
    return static_cast<int64_t>(
        std::exp2(std::uniform_real_distribution<double>(0, 18)(random)));
  };
  for (int i = 0; i < 20'000; ++i) {
    const int64_t m = draw(), n = draw(), k = draw();
    EXPECT_DOUBLE_EQ(
        MatmulUs(device(), m, n, k),
        PlainMatmulUs(device(), static_cast<double>(m), static_cast<double>(n),
                      static_cast<double>(k)))
        << m << " x " << k << " x " << n;
  }
}

TEST_P(EveryDevice, MoreWorkNeverTakesLess) {
  double last = 0;
  for (int64_t rows = 64; rows <= 16384; rows += 64) {
    const double us = MatmulUs(device(), rows, 4096, 4096);
    EXPECT_GE(us, last) << rows;
    last = us;
  }
  last = 0;
  for (int64_t bytes = 0; bytes <= 1'000'000'000; bytes += 1'000'000) {
    const double us = MemoryOpUs(device(), MemoryOpKind::kNorm, bytes);
    EXPECT_GE(us, last) << bytes;
    last = us;
  }
}

TEST_P(EveryDevice, LargeMatmulsReachMostOfTheRateAndSmallOnesDoNot) {
  const auto share = [this](int64_t rows, int64_t columns, int64_t inner) {
    return 2e6 * rows * columns * inner /
           (MatmulUs(device(), rows, columns, inner) *
            device().peak_flops_per_s);
  };
  EXPECT_GT(share(8192, 16384, 8192), 0.6);
  EXPECT_LT(share(1024, 512, 512), 0.4);
  // A wave that is just full against one tile more.
  EXPECT_GT(share(128 * device().sm_count, 256, 4096),
            share(128 * (device().sm_count + 1), 256, 4096));
}

// Each sends to one other, however many there are.
TEST(CollectiveUsTest, SendsInsideANodeTakeAsLongAmongMore) {
  const DeviceFactors& h100 = *FindDeviceFactors("h100");
  const auto us = [&](int workers) {
    return *CollectiveUs(h100, CollectiveOpKind::kSendReceive, workers, 8,
                         1'000'000'000);
  };
  EXPECT_EQ(us(4), us(2));
  EXPECT_EQ(us(8), us(2));
}

TEST_P(EveryDevice, CollectivesGrowWithBytesAndWorkers) {
  double last = 0;
  for (const int workers : {2, 3, 4, 6, 8}) {
    const absl::StatusOr<double> us = CollectiveUs(
        device(), CollectiveOpKind::kAllReduce, workers, 8, 64'000'000);
    ASSERT_TRUE(us.ok()) << us.status();
    EXPECT_GT(*us, last * 0.95) << workers;
    EXPECT_GT(*us, *CollectiveUs(device(), CollectiveOpKind::kAllReduce,
                                 workers, 8, 32'000'000));
    EXPECT_DOUBLE_EQ(*CollectiveUs(device(), CollectiveOpKind::kAllGather,
                                   workers, 8, 64'000'000),
                     *us / 2);
    last = *us;
  }
  EXPECT_EQ(
      *CollectiveUs(device(), CollectiveOpKind::kAllReduce, 1, 8, 1'000'000),
      0);
}

INSTANTIATE_TEST_SUITE_P(Devices, EveryDevice,
                         ::testing::ValuesIn(KnownDevices()));

TEST(OpRulesTest, FittedCountsAreMetAndOthersLieBetween) {
  const DeviceFactors& h100 = *FindDeviceFactors("h100");
  const double four =
      *CollectiveUs(h100, CollectiveOpKind::kAllReduce, 4, 4, 16'000'000);
  EXPECT_NEAR(four, 26.41 + 4.194 * 16, 1e-9);
  // Eight to a node, but only four take part.
  EXPECT_EQ(*CollectiveUs(h100, CollectiveOpKind::kAllReduce, 4, 8, 16'000'000),
            four);
  const double sixteen =
      *CollectiveUs(h100, CollectiveOpKind::kAllReduce, 16, 16, 16'000'000);
  const double eight =
      *CollectiveUs(h100, CollectiveOpKind::kAllReduce, 8, 8, 16'000'000);
  EXPECT_GT(sixteen, eight);
  // Latency inside a node is alike whatever the number of workers.
  EXPECT_LT(sixteen, 1.1 * eight);
}

TEST(OpRulesTest, WhatWasNeverMeasuredIsNotFound) {
  const absl::StatusOr<double> us =
      CollectiveUs(*FindDeviceFactors("h100"), CollectiveOpKind::kAllReduce, 16,
                   8, 1'000'000);
  EXPECT_EQ(us.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(us.status().message(), HasSubstr("across nodes"));
}

TEST(OpFactorsTest, NamesAreFoundByWordInAnyCase) {
  EXPECT_EQ(FindDeviceFactors("H100"), FindDeviceFactors("h100"));
  EXPECT_EQ(FindDeviceFactors("NVIDIA H100 80GB HBM3"),
            FindDeviceFactors("h100"));
  EXPECT_EQ(FindDeviceFactors("H20-96GB"), FindDeviceFactors("h20"));
  EXPECT_EQ(FindDeviceFactors("H200-141GB"), nullptr);
  EXPECT_EQ(FindDeviceFactors("b200"), nullptr);
  EXPECT_EQ(FindDeviceFactors(""), nullptr);
  EXPECT_THAT(KnownDevices(),
              ::testing::ElementsAre("a100", "h100", "h20", "h800"));
}

}  // namespace
}  // namespace pipeweaver::semu
