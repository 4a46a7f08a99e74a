// Tests of measured pipeline steps.

#include "profiler/pipeline_timings.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::profiler {
namespace {

using ::testing::HasSubstr;

StageDurations Uniform(int ranks, int microbatches, int64_t forward_ns,
                       int64_t backward_ns) {
  return {std::vector<std::vector<int64_t>>(
              ranks, std::vector<int64_t>(microbatches, forward_ns)),
          std::vector<std::vector<int64_t>>(
              ranks, std::vector<int64_t>(microbatches, backward_ns))};
}

TEST(OneForwardOneBackwardTest, EvenStagesTakeTheKnownTime) {
  // (M + P - 1) * (f + b), the textbook makespan of 1F1B without hops.
  for (const int ranks : {1, 2, 4, 8}) {
    for (const int microbatches : {8, 16}) {
      EXPECT_EQ(
          OneForwardOneBackwardNs(Uniform(ranks, microbatches, 100, 200), 0),
          (microbatches + ranks - 1) * 300);
    }
  }
  EXPECT_EQ(OneForwardOneBackwardNs(Uniform(8, 2, 100, 200), 0), (2 + 7) * 300)
      << "fewer microbatches than ranks";
}

TEST(OneForwardOneBackwardTest, OneMicrobatchCrossesEveryHopTwice) {
  EXPECT_EQ(OneForwardOneBackwardNs(Uniform(4, 1, 100, 200), 7),
            4 * 300 + 6 * 7);
}

// Timings as a pipeline with this hop would report them.
std::string RankJson(int64_t f0, int64_t f1, int64_t b0, int64_t b1) {
  const auto list = [](int64_t ms) { return "[" + std::to_string(ms) + "]"; };
  return "{\"1\": {\"total\": 9.5, \"fwd_start\": " + list(f0) +
         ", \"fwd_end\": " + list(f1) + ", \"bwd_start\": " + list(b0) +
         ", \"bwd_end\": " + list(b1) + "}}";
}

TEST(FitHopTest, FindsTheHop) {
  const absl::StatusOr<PipelineTimings> timings =
      ParsePipelineTimings({RankJson(0, 10, 46, 66), RankJson(13, 23, 23, 43)});
  ASSERT_TRUE(timings.ok()) << timings.status();
  EXPECT_EQ(MeasuredMakespanNs(timings->at(1)), 66'000'000);
  const absl::StatusOr<int64_t> hop_ns = FitHopNs(*timings, 1, 1);
  ASSERT_TRUE(hop_ns.ok());
  EXPECT_EQ(*hop_ns, 3'000'000);
}

TEST(ParsePipelineTimingsTest, ErrorsNameRankIterationAndField) {
  const auto message = [](const std::vector<std::string>& ranks) {
    return std::string(ParsePipelineTimings(ranks).status().message());
  };
  const std::string good = RankJson(0, 10, 46, 66);
  EXPECT_EQ(message({}), "no iterations");
  EXPECT_EQ(message({good, "[]"}), "rank 1: no JSON object");
  EXPECT_EQ(message({good, "{}"}), "iteration 1 is missing on rank 1");
  EXPECT_THAT(message({"{\"x\": {}}"}),
              HasSubstr("iteration 'x' is no integer"));
  EXPECT_THAT(message({"{\"1\": 3}"}),
              HasSubstr("rank 0, iteration 1: is no object"));
  EXPECT_THAT(message({"{\"1\": {}}"}), HasSubstr("fwd_start is no list"));
  EXPECT_THAT(message({RankJson(9, 3, 10, 11)}),
              HasSubstr("fwd_end[0] is before fwd_start[0]"));
  EXPECT_THAT(message({RankJson(-9, 3, 10, 11)}),
              HasSubstr("fwd_start[0] must be milliseconds"));
  EXPECT_THAT(
      message(
          {R"({"1": {"fwd_start": [1], "fwd_end": [], "bwd_start": [], "bwd_end": []}})"}),
      HasSubstr("fwd_start has 1 entries, fwd_end 0"));
  EXPECT_THAT(
      message(
          {R"({"1": {"fwd_start": [], "fwd_end": [], "bwd_start": [], "bwd_end": []}})"}),
      HasSubstr("0 forwards, 0 backwards"));
}

TEST(MedianDurationsTest, NeedsEveryIteration) {
  const absl::StatusOr<PipelineTimings> timings =
      ParsePipelineTimings({RankJson(0, 1, 2, 4)});
  ASSERT_TRUE(timings.ok());
  EXPECT_EQ(MedianDurations(*timings, 1, 2).status().message(),
            "iteration 2 is missing");
  EXPECT_FALSE(FitHopNs(*timings, 2, 1).ok());
  EXPECT_EQ(MedianDurations(*timings, 1, 1)->backward_ns[0][0], 2'000'000);
}

}  // namespace
}  // namespace pipeweaver::profiler
