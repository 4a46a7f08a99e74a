// Tests of trace import: hand-made traces of every age, and the reference
// traces where they are present.

#include "profiler/trace_import.h"

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <set>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "profiler/decimal.h"
#include "profiler/trace_figures.h"

namespace pipeweaver::profiler {
namespace {

using ::testing::HasSubstr;

absl::StatusOr<ImportedTrace> Import(const std::string& text) {
  const std::unique_ptr<TextSource> source = TextFromString(text, 7);
  return ImportTrace(*source);
}

TraceFigures Figures(const std::string& text) {
  const absl::StatusOr<ImportedTrace> trace = Import(text);
  EXPECT_TRUE(trace.ok()) << trace.status();
  if (!trace.ok()) return {};
  const absl::StatusOr<TraceFigures> figures = ComputeFigures(*trace);
  EXPECT_TRUE(figures.ok()) << figures.status();
  return figures.ok() ? *figures : TraceFigures();
}

TEST(TraceImportTest, ReadsOldAndNewSpelling) {
  const TraceFigures old_style =
      Figures(R"({"schemaVersion": 1, "traceEvents": [
    {"ph": "X", "cat": "Runtime", "name": "cudaLaunchKernel", "pid": 9, "tid": 1, "ts": 10, "dur": 2,
     "args": {"cbid": 211, "correlation": 5, "external id": 3}},
    {"ph": "X", "cat": "Kernel", "name": "k", "pid": 0, "tid": "stream 7", "ts": 1623143093553659, "dur": 2,
     "args": {"device": 0, "stream": 7, "correlation": 5, "external id": 3}}]})");
  EXPECT_EQ(old_style.kernels, 1);
  EXPECT_EQ(old_style.kernel_total_ns, 2000);
  EXPECT_EQ(old_style.unmatched_kernels, 0);

  const TraceFigures new_style = Figures(R"({"traceEvents": [
    {"args": {"correlation": "5"}, "dur": "18.112", "ts": "1428625731622.25", "name": "k", "cat": "kernel", "ph": "X"},
    {"ph": "X", "cat": "cuda_driver", "name": "cuLaunchKernelEx", "ts": 1.5, "dur": 1, "args": {"correlation": 5.0}}],
    "baseTimeNanoseconds": 1711964646000000000})");
  EXPECT_EQ(new_style.kernel_total_ns, 18112);
  EXPECT_EQ(new_style.unmatched_kernels, 0);
}

TEST(TraceImportTest, TakesAListOfEvents) {
  const std::string event =
      R"({"ph":"X","cat":"kernel","name":"k","ts":1,"dur":2,"pid":0})";
  EXPECT_EQ(Figures("[" + event + "," + event + "]").kernels, 2);
  EXPECT_EQ(Figures("[" + event + ",\n" + event).kernels, 2)
      << "the last bracket may be missing";
  EXPECT_EQ(Figures("[" + event + ",").kernels, 1);
}

TEST(TraceImportTest, PassesOverWhatItDoesNotKnow) {
  const TraceFigures figures =
      Figures(R"({"metadata": {"traceEvents": [1, {"ph": "X"}], "x": [[]]},
    "deviceProperties": [{"id": 0, "name": "G", "more": {"name": "not this"}}, {"name": "G"}, null, [3]],
    "distributedInfo": {"backend": "nccl", "rank": 3, "world_size": "8", "pg_config": [{"rank": 9}]},
    "traceEvents": [null, 7, "x", [{"ph": "X"}], {}, {"ph": "X"}, {"ph": ["X"], "cat": "kernel"},
      {"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": 1, "pid": 2,
       "args": {"grid": [1, 1, 1], "occupancy": NaN, "size": 99999999999999999999999, "stream": null}},
      {"ph": "X", "cat": "kernel", "name": "k", "ts": 1, "dur": 1, "pid": 2, "args": "none"},
      {"ph": "B", "cat": "kernel", "name": "k", "ts": 1}, {"ph": "i", "s": "g", "ts": NaN}]})");
  EXPECT_EQ(figures.kernels, 2);
  EXPECT_EQ(figures.kernel_total_ns, 2000);
  EXPECT_EQ(figures.busy_ns, 1000);
  EXPECT_EQ(figures.unmatched_kernels, 2);
}

TEST(TraceImportTest, ReadsMetadata) {
  const absl::StatusOr<ImportedTrace> trace = Import(R"({
    "deviceProperties": [{"id": 0, "name": "H100"}, {"id": 1, "name": "H100"}, {"id": 2, "name": "A100"}],
    "distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 8}, "cuda_runtime_version": 12040,
    "traceEvents": [], "baseTimeNanoseconds": 1711964646000000000, "traceName": "t.json"})");
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_THAT(trace->metadata.device_names,
              ::testing::ElementsAre("H100", "A100"));
  EXPECT_EQ(trace->metadata.rank, 3);
  EXPECT_EQ(trace->metadata.world_size, 8);
  EXPECT_EQ(trace->metadata.cuda_runtime_version, "12040");
  EXPECT_EQ(trace->metadata.base_time_ns, 1711964646000000000);
}

TEST(TraceImportTest, CountsDeviceWorkItCannotUse) {
  const absl::StatusOr<ImportedTrace> trace = Import(R"([
    {"ph":"X","cat":"kernel","name":"none","dur":2},
    {"ph":"X","cat":"kernel","name":"nan","ts":NaN,"dur":2},
    {"ph":"X","cat":"kernel","name":"huge","ts":1,"dur":1e300},
    {"ph":"X","cat":"kernel","name":"negative","ts":1,"dur":-2},
    {"ph":"X","cat":"kernel","name":"sum","ts":9223372036854775,"dur":1},
    {"ph":"X","cat":"kernel","name":"good","ts":1,"dur":2}])");
  ASSERT_TRUE(trace.ok()) << trace.status();
  EXPECT_EQ(trace->unusable_device_records, 5);
  EXPECT_EQ(trace->first_unusable,
            "'none': ts is absent or no number of int64 nanoseconds");
  EXPECT_EQ(trace->device_records.size(), 1u);
}

TEST(TraceImportTest, RefusesWhatIsNoTrace) {
  EXPECT_THAT(Import("").status().message(), HasSubstr("empty"));
  EXPECT_THAT(Import("7").status().message(),
              HasSubstr("a trace is an object"));
  EXPECT_THAT(Import("{}").status().message(), HasSubstr("no traceEvents"));
  EXPECT_THAT(Import(R"({"traceEvents": 7})").status().message(),
              HasSubstr("is not a list"));
  EXPECT_EQ(Import(R"({"traceEvents": [{"ph": "X"}, )").status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(Import(R"([{"ph": "X"}, {"ph)").status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(Import(R"({"traceEvents": []} x)").status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ImportTraceFile("/nonexistent/trace.json").status().code(),
            absl::StatusCode::kNotFound);
}

TEST(TraceFiguresTest, BusyIsTheUnionPerDevice) {
  const TraceFigures figures = Figures(R"([
    {"ph":"X","cat":"kernel","name":"ncclKernel_AllReduce","ts":0,"dur":10,"args":{"device":0,"stream":1}},
    {"ph":"X","cat":"kernel","name":"b","ts":5,"dur":10,"args":{"device":0,"stream":2}},
    {"ph":"X","cat":"kernel","name":"b","ts":6,"dur":1,"args":{"device":0,"stream":3}},
    {"ph":"X","cat":"kernel","name":"cross_device_reduce_2stage","ts":30,"dur":0.5,"args":{"device":1}},
    {"ph":"X","cat":"gpu_memcpy","name":"Memcpy","ts":50,"dur":5,"args":{"device":1}}])");
  EXPECT_EQ(figures.kernels, 4);
  EXPECT_EQ(figures.kernel_names, 3);
  EXPECT_EQ(figures.kernel_total_ns, 21500);
  EXPECT_EQ(figures.busy_ns, 15500);
  EXPECT_EQ(figures.nccl_kernels, 1);
  EXPECT_EQ(figures.nccl_total_ns, 10000);
  EXPECT_EQ(figures.collective_kernels, 2);
  EXPECT_EQ(figures.collective_total_ns, 10500);
  ASSERT_EQ(figures.top10.size(), 3u);
  EXPECT_EQ(figures.top10[0].name, "b");
  EXPECT_EQ(figures.top10[1].name, "ncclKernel_AllReduce");
}

TEST(TraceFiguresTest, SumsThatLeaveInt64AreAnError) {
  const absl::StatusOr<ImportedTrace> trace = Import(R"([
    {"ph":"X","cat":"kernel","name":"a","ts":0,"dur":9223372036854775},
    {"ph":"X","cat":"kernel","name":"a","ts":0,"dur":9223372036854775}])");
  ASSERT_TRUE(trace.ok());
  EXPECT_EQ(ComputeFigures(*trace).status().code(),
            absl::StatusCode::kOutOfRange);
}

TEST(TraceFiguresTest, JsonIsValidForAnyName) {
  const TraceFigures figures = Figures(
      "[{\"ph\":\"X\",\"cat\":\"kernel\",\"name\":\"\xFFq\\\"\\u0001\",\"ts\":"
      "0,\"dur\":1}]");
  const nlohmann::json json =
      nlohmann::json::parse(FiguresJson(figures), nullptr, false);
  ASSERT_FALSE(json.is_discarded());
  EXPECT_EQ(json["top10"][0][0], "\xEF\xBF\xBDq\"\x01");
  EXPECT_EQ(json["top10"][0][2], 1000);
}

// Every reference trace, against figures computed in exact decimals elsewhere.
TEST(ReferenceTracesTest, FiguresAreExact) {
  const char* folder = std::getenv("PIPEWEAVER_SHARED");
  const std::filesystem::path traces =
      std::filesystem::path(folder != nullptr ? folder : "../shared") /
      "traces";
  if (!std::filesystem::exists(traces / "expected.json")) {
    GTEST_SKIP() << "skipped: " << (traces / "expected.json") << " missing";
  }
  const absl::StatusOr<std::string> text =
      ReadTextFile((traces / "expected.json").string(), 64 << 20);
  ASSERT_TRUE(text.ok()) << text.status();
  const nlohmann::json expected = nlohmann::json::parse(*text, nullptr, false);
  ASSERT_TRUE(expected.is_object());
  ASSERT_GE(expected.size(), 10u);
  const auto nanoseconds = [](const nlohmann::json& text) {
    return ScaledDecimal(text.get<std::string>(), 3).value();
  };
  for (const auto& [file, want] : expected.items()) {
    SCOPED_TRACE(file);
    const absl::StatusOr<ImportedTrace> trace =
        ImportTraceFile((traces / file).string());
    ASSERT_TRUE(trace.ok()) << trace.status();
    EXPECT_EQ(trace->unusable_device_records, 0);
    EXPECT_EQ(trace->metadata.events, want["events"].get<int64_t>());
    const absl::StatusOr<TraceFigures> got = ComputeFigures(*trace);
    ASSERT_TRUE(got.ok()) << got.status();
    EXPECT_EQ(got->kernels, want["kernels"].get<int64_t>());
    EXPECT_EQ(got->kernel_names, want["kernel_names"].get<int64_t>());
    EXPECT_EQ(got->kernel_total_ns, nanoseconds(want["kernel_total_us"]));
    int64_t busy_ns = 0;
    for (const auto& device : want["kernel_busy_union_us_per_device"])
      busy_ns += nanoseconds(device);
    EXPECT_EQ(got->busy_ns, busy_ns);
    EXPECT_EQ(got->unmatched_kernels,
              want["kernels"].get<int64_t>() -
                  want["kernels_matched_to_runtime_launch"].get<int64_t>());
    EXPECT_EQ(got->nccl_kernels, want["nccl_kernels"].get<int64_t>());
    EXPECT_EQ(got->nccl_total_ns, nanoseconds(want["nccl_total_us"]));
    ASSERT_EQ(got->top10.size(), want["top10"].size());
    for (std::size_t i = 0; i < got->top10.size(); ++i) {
      EXPECT_EQ(got->top10[i].name, want["top10"][i][0].get<std::string>());
      EXPECT_EQ(got->top10[i].count, want["top10"][i][1].get<int64_t>());
      EXPECT_EQ(got->top10[i].total_ns, nanoseconds(want["top10"][i][2]));
    }
  }
}

}  // namespace
}  // namespace pipeweaver::profiler
