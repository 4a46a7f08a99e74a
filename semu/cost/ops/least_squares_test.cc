// Tests of the bounded robust least squares.

#include "semu/cost/ops/least_squares.h"

#include <cmath>
#include <vector>

#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

// y = a * exp(-b x) with every tenth point far off.
std::vector<double> Decay(double outlier) {
  std::vector<double> y(50);
  for (int i = 0; i < 50; ++i) {
    y[i] = 3 * std::exp(-0.1 * i) + (i % 10 == 3 ? outlier : 0);
  }
  return y;
}

LeastSquaresResult FitDecay(const std::vector<double>& y, double high,
                            double outlier_scale) {
  return MinimizeSquares(
      {{1, 0, 10}, {0.5, 0, high}},
      [&y](const std::vector<double>& values, std::vector<double>& residuals) {
        residuals.resize(y.size());
        for (std::size_t i = 0; i < y.size(); ++i) {
          residuals[i] =
              values[0] * std::exp(-values[1] * static_cast<double>(i)) - y[i];
        }
      },
      {.outlier_scale = outlier_scale});
}

TEST(LeastSquaresTest, FindsTheMinimum) {
  const LeastSquaresResult result = FitDecay(Decay(0), 2, 1);
  EXPECT_NEAR(result.values[0], 3, 1e-4);
  EXPECT_NEAR(result.values[1], 0.1, 1e-5);
  EXPECT_NEAR(result.cost, 0, 1e-8);
}

TEST(LeastSquaresTest, HoldsOutliersDown) {
  const LeastSquaresResult robust = FitDecay(Decay(5), 2, 0.01);
  const LeastSquaresResult plain = FitDecay(Decay(5), 2, 1e6);
  EXPECT_NEAR(robust.values[0], 3, 0.05);
  EXPECT_GT(std::abs(plain.values[0] - 3), 0.2);
}

TEST(LeastSquaresTest, StaysInTheBox) {
  const LeastSquaresResult result = FitDecay(Decay(0), 0.05, 1);
  EXPECT_LE(result.values[1], 0.05);
  EXPECT_NEAR(result.values[1], 0.05, 1e-6);
}

TEST(LeastSquaresTest, AParameterWithoutEffectStaysWhereItIs) {
  const LeastSquaresResult result =
      MinimizeSquares({{1, 0, 10}, {7, 0, 10}},
                      [](const std::vector<double>& values,
                         std::vector<double>& r) { r = {values[0] - 2}; });
  EXPECT_NEAR(result.values[0], 2, 1e-6);
  EXPECT_EQ(result.values[1], 7);
}

}  // namespace
}  // namespace pipeweaver::semu
