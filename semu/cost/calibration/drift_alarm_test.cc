// Tests of the drift alarm.

#include "semu/cost/calibration/drift_alarm.h"

#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

TEST(DriftAlarmTest, NamesStepsBeyondTheTolerance) {
  DriftAlarm alarm;
  EXPECT_FALSE(alarm.Observe(1, 1000, 1029));
  EXPECT_FALSE(alarm.Observe(2, 1000, 975));
  const std::optional<Drift> slow = alarm.Observe(3, 1000, 1100);
  ASSERT_TRUE(slow);
  EXPECT_EQ(slow->step, 3);
  EXPECT_NEAR(slow->relative_error, 0.1, 1e-12);
  EXPECT_NEAR(slow->limit, 0.03, 1e-12);
  EXPECT_TRUE(alarm.Observe(4, 1000, 900)) << "too fast is drift as well";
}

TEST(DriftAlarmTest, ToleratesMoreWhereStepsSpread) {
  DriftAlarm noisy;
  for (int i = 0; i < 20; ++i) noisy.Observe(i, 1000, i % 2 == 0 ? 1025 : 976);
  EXPECT_FALSE(noisy.Observe(20, 1000, 1100));
  EXPECT_TRUE(noisy.Observe(21, 1000, 1300));
}

TEST(DriftAlarmTest, AnAlarmDoesNotDullTheNext) {
  DriftAlarm alarm;
  for (int i = 0; i < 10; ++i) EXPECT_FALSE(alarm.Observe(i, 1000, 1001));
  for (int i = 10; i < 200; ++i) EXPECT_TRUE(alarm.Observe(i, 1000, 1500)) << i;
}

}  // namespace
}  // namespace pipeweaver::semu
