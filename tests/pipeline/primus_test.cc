// A real pipeline of 8 ranks (Primus, 1F1B, 16 microbatches, 20 iterations),
// where its timings are present: the hop fitted on iterations 2 to 10 must
// predict 11 to 20, and the drift alarm must name the warm-up and the two slow
// iterations.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "profiler/pipeline_timings.h"
#include "semu/base/text_source.h"
#include "semu/cost/calibration/drift_alarm.h"

namespace pipeweaver {
namespace {

// The plain files of a tar archive.
std::map<std::string, std::string> Untar(const std::string& archive) {
  constexpr std::size_t kBlock = 512;
  std::map<std::string, std::string> files;
  for (std::size_t at = 0;
       at + kBlock <= archive.size() && archive[at] != '\0';) {
    const std::string name(&archive[at], strnlen(&archive[at], 100));
    const std::size_t size =
        std::strtoul(archive.substr(at + 124, 12).c_str(), nullptr, 8);
    if (archive[at + 156] == '0')
      files[name] = archive.substr(at + kBlock, size);
    at += kBlock + (size + kBlock - 1) / kBlock * kBlock;
  }
  return files;
}

TEST(PrimusTest, HopFittedOnEarlyIterationsPredictsLateOnes) {
  const char* shared = std::getenv("PIPEWEAVER_SHARED");
  const std::filesystem::path path =
      std::filesystem::path(shared != nullptr ? shared : "../shared") /
      "traces" / "primus_pp8.tar.gz";
  if (!std::filesystem::exists(path))
    GTEST_SKIP() << "skipped: " << path << " missing";
  const absl::StatusOr<std::string> archive =
      ReadTextFile(path.string(), 64 << 20);
  ASSERT_TRUE(archive.ok()) << archive.status();
  std::map<std::string, std::string> files = Untar(*archive);
  std::vector<std::string> ranks;
  ranks.reserve(8);
  for (int rank = 0; rank < 8; ++rank) {
    ranks.push_back(files["pp8/pp_rank_" + std::to_string(rank) + ".json"]);
  }
  const absl::StatusOr<profiler::PipelineTimings> timings =
      profiler::ParsePipelineTimings(ranks);
  ASSERT_TRUE(timings.ok()) << timings.status();
  ASSERT_EQ(timings->size(), 20u);

  const absl::StatusOr<int64_t> hop_ns = profiler::FitHopNs(*timings, 2, 10);
  const absl::StatusOr<profiler::StageDurations> durations =
      profiler::MedianDurations(*timings, 2, 10);
  ASSERT_TRUE(hop_ns.ok() && durations.ok());
  const int64_t predicted_ns =
      profiler::OneForwardOneBackwardNs(*durations, *hop_ns);

  semu::DriftAlarm alarm;
  std::vector<int64_t> named;
  double worst = 0;
  double error_sum = 0;
  int ordinary = 0;
  for (const auto& [number, iteration] : *timings) {
    const int64_t measured_ns = profiler::MeasuredMakespanNs(iteration);
    const auto drift = alarm.Observe(number, predicted_ns, measured_ns);
    if (drift) {
      named.push_back(number);
    } else if (number >= 11) {
      const double error = std::abs(static_cast<double>(predicted_ns) /
                                        static_cast<double>(measured_ns) -
                                    1);
      worst = std::max(worst, error);
      error_sum += error;
      ++ordinary;
    }
  }
  std::printf(
      "hop %.3f ms, predicted %.1f ms, mean error %.2f %%, worst %.2f %%\n",
      *hop_ns / 1e6, predicted_ns / 1e6, 100 * error_sum / ordinary,
      100 * worst);
  EXPECT_THAT(named, ::testing::ElementsAre(1, 16, 18));
  EXPECT_EQ(ordinary, 8);
  EXPECT_LT(worst, 0.01);
}

}  // namespace
}  // namespace pipeweaver
