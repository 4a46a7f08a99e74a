// A schedule's timeline has its stages, its crossings and its peak memory.

#include "search/plan/schedule_timeline.h"

#include <algorithm>
#include <random>

#include "gtest/gtest.h"
#include "search/plan/plan_checker.h"
#include "search/plan/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

TEST(ScheduleTimelineTest, ShowsWhatTheScheduleSays) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 200; ++i) {
    const Problem problem = testing::RandomStepProblem(random).problem;
    const Schedule schedule = testing::RandomSchedule(problem, random);
    const auto checked = CheckSchedule(problem, schedule);
    const semu::Timeline timeline =
        ScheduleTimeline(problem, schedule, checked->times);
    size_t span = 0;
    for (int r = 0; r < problem.ranks; ++r) {
      for (size_t k = 0; k < schedule.ranks[r].size(); ++k, ++span) {
        const ScheduledStage& s = schedule.ranks[r][k];
        ASSERT_LT(span, timeline.spans.size());
        EXPECT_EQ(timeline.spans[span].rank, r);
        EXPECT_EQ(timeline.spans[span].start_ns,
                  checked->times.ranks[r][k].start_ns);
        EXPECT_EQ(timeline.spans[span].kind, StageKindLetter(s.kind));
        // Ids read "mb0/m1/2/0".
        EXPECT_EQ("/" + timeline.modules[timeline.spans[span].module] + "/",
                  problem.sweeps[s.sweep].id.substr(3, 4));
      }
      int64_t peak = 0;
      for (const semu::MemorySample& sample : timeline.memory[r]) {
        peak = std::max(peak, sample.bytes);
      }
      EXPECT_EQ(peak, checked->peak_bytes[r]);
    }
    for (const semu::TimelineTransfer& x : timeline.transfers) {
      EXPECT_NE(timeline.spans[x.from_span].rank,
                timeline.spans[x.to_span].rank);
      EXPECT_LE(timeline.spans[x.from_span].end_ns,
                timeline.spans[x.to_span].start_ns);
    }
  }
}

}  // namespace
}  // namespace pipeweaver::search
