// Tests of the exact decimal conversion.

#include "profiler/decimal.h"

#include <cstdint>
#include <limits>
#include <optional>

#include "gtest/gtest.h"

namespace pipeweaver::profiler {
namespace {

TEST(ScaledDecimalTest, TakesEverySpellingOfANumber) {
  EXPECT_EQ(ScaledDecimal("12", 3), 12000);
  EXPECT_EQ(ScaledDecimal("68.0", 3), 68000);
  EXPECT_EQ(ScaledDecimal("1428625731622.25", 3), 1428625731622250);
  EXPECT_EQ(ScaledDecimal("1711964646000000000", 0), 1711964646000000000);
  EXPECT_EQ(ScaledDecimal("1.5e+03", 3), 1500000);
  EXPECT_EQ(ScaledDecimal("15E-1", 3), 1500);
  EXPECT_EQ(ScaledDecimal("-0.001", 3), -1);
  EXPECT_EQ(ScaledDecimal("+7", 0), 7);
  EXPECT_EQ(ScaledDecimal(".5", 3), 500);
  EXPECT_EQ(ScaledDecimal("5.", 3), 5000);
  EXPECT_EQ(ScaledDecimal(" 42 ", 0), 42);
  EXPECT_EQ(ScaledDecimal("000000000000000000000000000012.5", 3), 12500);
}

TEST(ScaledDecimalTest, RoundsBelowTheUnitHalfAwayFromZero) {
  EXPECT_EQ(ScaledDecimal("1.0004", 3), 1000);
  EXPECT_EQ(ScaledDecimal("1.0005", 3), 1001);
  EXPECT_EQ(ScaledDecimal("-1.0005", 3), -1001);
  EXPECT_EQ(ScaledDecimal("0.00049999", 3), 0);
  EXPECT_EQ(ScaledDecimal("9e-4", 3), 1);
  EXPECT_EQ(ScaledDecimal("9e-5", 3), 0);
  EXPECT_EQ(ScaledDecimal("9e-999999999999", 3), 0);
}

TEST(ScaledDecimalTest, LimitsAreExact) {
  EXPECT_EQ(ScaledDecimal("9223372036854775807", 0),
            std::numeric_limits<int64_t>::max());
  EXPECT_EQ(ScaledDecimal("9223372036854775808", 0), std::nullopt);
  EXPECT_EQ(ScaledDecimal("-9223372036854775808", 0),
            std::numeric_limits<int64_t>::min());
  EXPECT_EQ(ScaledDecimal("-9223372036854775809", 0), std::nullopt);
  EXPECT_EQ(ScaledDecimal("9223372036854775.8075", 3), std::nullopt);
  EXPECT_EQ(ScaledDecimal("1e400", 3), std::nullopt);
  EXPECT_EQ(ScaledDecimal("0e400", 3), 0);
  EXPECT_EQ(ScaledDecimal("1e99999999999999999999", 3), std::nullopt);
}

TEST(ScaledDecimalTest, RefusesWhatIsNoNumber) {
  for (const char* text : {"", "-", ".", "e5", "1e", "NaN", "Infinity",
                           "-Infinity", "0x10", "1 2", "1.2.3", "12a", "--1"}) {
    EXPECT_EQ(ScaledDecimal(text, 3), std::nullopt) << text;
  }
}

TEST(MicrosecondsTextTest, WritesNoTrailingZeros) {
  EXPECT_EQ(MicrosecondsText(0), "0");
  EXPECT_EQ(MicrosecondsText(18112), "18.112");
  EXPECT_EQ(MicrosecondsText(68000), "68");
  EXPECT_EQ(MicrosecondsText(68010), "68.01");
  EXPECT_EQ(MicrosecondsText(-5), "-0.005");
  EXPECT_EQ(MicrosecondsText(std::numeric_limits<int64_t>::min()),
            "-9223372036854775.808");
}

}  // namespace
}  // namespace pipeweaver::profiler
