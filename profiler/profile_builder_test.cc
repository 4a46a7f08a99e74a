// Tests of attribution, of telling waiting from transfer, and of the profile's
// points.

#include "profiler/profile_builder.h"

#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "profiler/attribution.h"
#include "profiler/collective_waiting.h"
#include "profiler/layer_annotation.h"
#include "profiler/profile_file.h"
#include "profiler/trace_figures.h"

namespace pipeweaver::profiler {
namespace {

ImportedTrace Import(const std::string& events) {
  const std::unique_ptr<TextSource> source =
      TextFromString(absl::StrCat("[", events, "]"));
  absl::StatusOr<ImportedTrace> trace = ImportTrace(*source);
  EXPECT_TRUE(trace.ok()) << trace.status();
  return trace.ok() ? *std::move(trace) : ImportedTrace();
}

std::string Host(const std::string& category, const std::string& name,
                 int thread, int start, int duration,
                 const std::string& args = "") {
  return absl::StrCat(R"({"ph":"X","cat":")", category, R"(","name":")", name,
                      R"(","pid":1,"tid":)", thread, R"(,"ts":)", start,
                      R"(,"dur":)", duration, R"(,"args":{)", args, "}}");
}

std::string Launch(int thread, int start, int correlation) {
  return Host("cuda_runtime", "cudaLaunchKernel", thread, start, 1,
              absl::StrCat(R"("correlation":)", correlation));
}

std::string Kernel(const std::string& name, int start, int duration,
                   const std::string& args) {
  return absl::StrCat(R"({"ph":"X","cat":"kernel","name":")", name,
                      R"(","pid":0,"tid":7,"ts":)", start, R"(,"dur":)",
                      duration, R"(,"args":{"device":0,"stream":7,)", args,
                      "}}");
}

std::string Correlation(int id) {
  return absl::StrCat(R"("correlation":)", id);
}

// The operator and annotation of each device record, by name.
std::vector<std::pair<std::string, std::string>> Owners(
    const ImportedTrace& trace) {
  const Attribution attribution = Attribute(trace);
  const auto name = [&trace](int32_t host) {
    return host == kUnattributed
               ? "-"
               : trace.strings.Get(trace.host_records[host].name);
  };
  std::vector<std::pair<std::string, std::string>> owners;
  for (std::size_t i = 0; i < trace.device_records.size(); ++i) {
    owners.emplace_back(name(attribution.operators[i]),
                        name(attribution.annotations[i]));
  }
  return owners;
}

TEST(AttributionTest, InnermostOperatorAndAnnotationAroundTheLaunch) {
  const ImportedTrace trace = Import(absl::StrCat(
      Kernel("k1", 500, 5, Correlation(1)), ",",
      Kernel("k2", 510, 5, Correlation(2)), ",",
      Kernel("k3", 520, 5, Correlation(3)), ",",
      Kernel("k4", 530, 5, Correlation(4)), ",", Launch(1, 12, 1), ",",
      Launch(1, 31, 2), ",", Launch(1, 90, 3), ",", Launch(2, 40, 4), ",",
      Host("cpu_op", "aten::linear", 1, 10, 30), ",",
      Host("cpu_op", "aten::mm", 1, 11, 5), ",",
      Host("user_annotation", "step", 1, 0, 80), ",",
      Host("user_annotation", "forward", 1, 5, 20), ",",
      Host("cpu_op", "MmBackward0", 2, 35, 10)));
  EXPECT_THAT(
      Owners(trace),
      ::testing::ElementsAre(
          std::make_pair("aten::mm", "forward"),
          std::make_pair("aten::linear", "step"), std::make_pair("-", "-"),
          // The autograd thread has no annotation of its own.
          std::make_pair("MmBackward0", "step")));
}

TEST(AttributionTest, ExternalIdStandsInForALostLaunch) {
  const ImportedTrace trace = Import(absl::StrCat(
      Kernel("k", 500, 5, R"("correlation":9,"External id":77)"), ",",
      Host("cpu_op", "aten::mm", 1, 11, 5, R"("External id":77)"), ",",
      Kernel("k", 600, 5, R"("correlation":8)")));
  EXPECT_THAT(Owners(trace),
              ::testing::ElementsAre(std::make_pair("aten::mm", "-"),
                                     std::make_pair("-", "-")));
}

TEST(AttributionTest, NeighboursAreNoParents) {
  const ImportedTrace trace =
      Import(absl::StrCat(Host("user_annotation", "step", 1, 0, 40), ",",
                          Host("user_annotation", "forward", 1, 0, 10), ",",
                          Host("user_annotation", "backward", 1, 10, 20)));
  EXPECT_THAT(Attribute(trace).parent_annotations,
              ::testing::ElementsAre(kUnattributed, 0, 0));
}

// What lies around each annotation of the host, by name, innermost first.
std::vector<std::string> Nesting(const ImportedTrace& trace) {
  const std::vector<int32_t> parents = Attribute(trace).parent_annotations;
  std::vector<std::string> nesting;
  for (std::size_t i = 0; i < parents.size(); ++i) {
    nesting.push_back(trace.strings.Get(trace.host_records[i].name));
    for (int32_t at = parents[i]; at != kUnattributed; at = parents[at]) {
      absl::StrAppend(&nesting.back(), " < ",
                      trace.strings.Get(trace.host_records[at].name));
    }
  }
  return nesting;
}

constexpr char kBackward[] =
    "pw:module=m,layer=transformer,pass=backward,tokens=64";

TEST(AttributionTest, AnotherThreadsOwnAnnotationLiesInsideTheLayer) {
  const ImportedTrace trace = Import(absl::StrCat(
      Kernel("k", 500, 5, Correlation(1)), ",",
      Kernel("k", 510, 5, Correlation(2)), ",", Launch(2, 120, 1), ",",
      Launch(2, 195, 2), ",", Host("user_annotation", "step", 1, 0, 900), ",",
      Host("user_annotation", kBackward, 1, 100, 100), ",",
      Host("user_annotation", "compiled", 2, 110, 80), ",",
      Host("user_annotation", "beyond", 2, 192, 20)));
  EXPECT_THAT(Owners(trace),
              ::testing::ElementsAre(std::make_pair("-", "compiled"),
                                     std::make_pair("-", "beyond")));
  const std::string layer = absl::StrCat(kBackward, " < step");
  EXPECT_THAT(Nesting(trace),
              ::testing::ElementsAre("step", layer, "compiled < " + layer,
                                     "beyond < step"));
}

TEST(AttributionTest, ThreadsWithoutAnnotationsWorkForTheLayer) {
  const ImportedTrace trace = Import(absl::StrCat(
      Kernel("k", 500, 5, Correlation(1)), ",",
      Kernel("k", 510, 5, Correlation(2)), ",", Launch(2, 120, 1), ",",
      Launch(2, 160, 2), ",", Host("user_annotation", kBackward, 1, 100, 100),
      ",", Host("user_annotation", "attention", 1, 150, 20), ",",
      Host("user_annotation", "pin_memory", 9, 110, 200), ",",
      Host("user_annotation", "later", 9, 155, 30)));
  EXPECT_THAT(Owners(trace),
              ::testing::ElementsAre(std::make_pair("-", kBackward),
                                     std::make_pair("-", "attention")));
}

TEST(AttributionTest, LayersOfOtherThreadsDoNotNest) {
  const ImportedTrace trace =
      Import(absl::StrCat(Host("user_annotation", "step", 1, 0, 900), ",",
                          Host("user_annotation", kBackward, 1, 100, 100), ",",
                          Host("user_annotation", kBackward, 2, 100, 100), ",",
                          Host("user_annotation", kBackward, 2, 110, 20)));
  const std::string layer = absl::StrCat(kBackward, " < step");
  EXPECT_THAT(Nesting(trace),
              ::testing::ElementsAre("step", layer, layer,
                                     absl::StrCat(kBackward, " < ", layer)));
}

TEST(AttributionTest, ALostLaunchsOperatorLiesInsideTheLayer) {
  const ImportedTrace trace = Import(absl::StrCat(
      Kernel("k", 500, 5, R"("correlation":9,"External id":77)"), ",",
      Host("cpu_op", "aten::mm", 1, 110, 5, R"("External id":77)"), ",",
      Host("user_annotation", kBackward, 1, 100, 100)));
  EXPECT_THAT(Owners(trace),
              ::testing::ElementsAre(std::make_pair("aten::mm", kBackward)));
}

TEST(AttributionTest, ALaunchWithAStartStandsBeforeOnesWithout) {
  const ImportedTrace trace = Import(absl::StrCat(
      Kernel("k", 500, 5, Correlation(1)), ",",
      R"({"ph":"X","cat":"cuda_driver","name":"cuLaunchKernelEx","pid":1,)",
      R"("tid":1,"dur":1,"args":{"correlation":1}},)", Launch(1, 12, 1), ",",
      Host("user_annotation", "step", 1, 0, 80)));
  EXPECT_THAT(Owners(trace),
              ::testing::ElementsAre(std::make_pair("-", "step")));
}

TEST(AttributionTest, IdsOfSeveralProcessesSayNothing) {
  const ImportedTrace trace = Import(absl::StrCat(
      Kernel("k", 500, 5, R"("correlation":1,"External id":77)"), ",",
      Launch(1, 12, 1), ",",
      R"({"ph":"X","cat":"cuda_runtime","name":"cudaLaunchKernel","pid":2,)",
      R"("tid":1,"ts":12,"dur":1,"args":{"correlation":1}},)",
      R"({"ph":"X","cat":"cpu_op","name":"aten::add","pid":2,"tid":1,"ts":10,)",
      R"("dur":5,"args":{"External id":77}},)",
      Host("cpu_op", "aten::mm", 1, 10, 5, R"("External id":77)"), ",",
      Host("user_annotation", "step", 1, 0, 80)));
  EXPECT_THAT(Owners(trace), ::testing::ElementsAre(std::make_pair("-", "-")));
  EXPECT_EQ(ComputeFigures(trace)->unmatched_kernels, 1);
}

TEST(LayerAnnotationTest, ReadsAndWritesTheAgreedForm) {
  const std::string text =
      "pw:module=vision,layer=transformer,pass=input_grad,items=8,tokens=8192,"
      "sum_squares=8388608,max_tokens=1024,tp=4,cp=1";
  const std::optional<v1::LayerKey> key = ParseLayerAnnotation(text);
  ASSERT_TRUE(key);
  EXPECT_EQ(key->tokens(), 8192);
  EXPECT_EQ(key->pass(), v1::LAYER_PASS_INPUT_GRAD);
  EXPECT_EQ(LayerAnnotation(*key), text);
  EXPECT_EQ(key->condition_tokens(), 0);
  const std::string conditioned =
      "pw:module=video,layer=dit,pass=forward,items=2,tokens=96,"
      "condition_tokens=40,condition_products=1600,tp=4,cp=1";
  const std::optional<v1::LayerKey> dit = ParseLayerAnnotation(conditioned);
  ASSERT_TRUE(dit);
  EXPECT_EQ(dit->condition_tokens(), 40);
  EXPECT_EQ(dit->condition_products(), 1600);
  EXPECT_EQ(LayerAnnotation(*dit), conditioned);
  for (const char* other : {"ProfilerStep#4", "pw:", "pw:module=a,layer=b",
                            "pw:module=a,layer=b,pass=sideways",
                            "pw:module=a,layer=b,pass=forward,tokens=-1",
                            "pw:module=a,layer=b,pass=forward,x=1",
                            ("pw:module=a,layer=b,pass=forward,"
                             "condition_tokens=-1"),
                            "pw:module=a,module=a,layer=b,pass=forward",
                            "pw:module=a,layer=b,pass=forward,"}) {
    EXPECT_FALSE(ParseLayerAnnotation(other)) << other;
  }
}

constexpr char kAllReduce[] = "ncclKernel_AllReduce_RING_LL_Sum_float";

std::string Collective(int start, int duration, const std::string& args = "") {
  return Kernel(
      kAllReduce, start, duration,
      args +
          R"("Process Group Name":"1","Process Group Ranks":"[0, 1]","Group size":2,)"
          R"("In msg nelems":1024,"dtype":"Float")");
}

TEST(CollectiveWaitingTest, TheMinimumOverRanksIsTheTransfer) {
  // In the file's order the second of rank 1 stands first.
  const ImportedTrace rank0 =
      Import(absl::StrCat(Collective(0, 100), ",", Collective(200, 30)));
  const ImportedTrace rank1 =
      Import(absl::StrCat(Collective(220, 10), ",", Collective(80, 20)));
  const std::vector<CollectiveTime> times = SeparateWaiting({&rank0, &rank1});
  ASSERT_EQ(times.size(), 4u);
  EXPECT_EQ(times[0].transfer_ns, 20000);
  EXPECT_EQ(times[0].waiting_ns, 80000);
  EXPECT_EQ(times[1].transfer_ns, 10000);
  EXPECT_EQ(times[1].waiting_ns, 20000);
  EXPECT_EQ(times[2].waiting_ns, 0);
  EXPECT_EQ(times[3].waiting_ns, 0);
  EXPECT_FALSE(times[0].includes_waiting);
}

TEST(CollectiveWaitingTest, WaitingStaysInWhereRanksDoNotMatch) {
  const ImportedTrace rank0 =
      Import(absl::StrCat(Collective(0, 100), ",", Collective(200, 30)));
  const ImportedTrace rank1 = Import(Collective(80, 20));
  for (const auto& traces : std::vector<std::vector<const ImportedTrace*>>{
           {&rank0}, {&rank0, &rank1}}) {
    for (const CollectiveTime& time : SeparateWaiting(traces)) {
      EXPECT_TRUE(time.includes_waiting);
      EXPECT_EQ(time.waiting_ns, 0);
    }
  }
}

TEST(CollectiveWaitingTest, WaitingMayBeLeftWhereRanksAreMissing) {
  std::vector<ImportedTrace> traces;
  for (int64_t rank = 0; rank < 2; ++rank) {
    traces.push_back(Import(Collective(0, 20 + 80 * rank)));
    traces.back().metadata.rank = rank;
    traces.back().collectives[0].group_size = 8;
  }
  const std::vector<CollectiveTime> some =
      SeparateWaiting({&traces[0], &traces[1]});
  EXPECT_EQ(some[1].waiting_ns, 80000);
  EXPECT_TRUE(some[1].includes_waiting);
  // Where the call does not say, the group is the run.
  for (ImportedTrace& trace : traces) {
    trace.collectives[0].group_size = 0;
    trace.metadata.world_size = 8;
  }
  EXPECT_TRUE(SeparateWaiting({&traces[0], &traces[1]})[1].includes_waiting);
  for (ImportedTrace& trace : traces) trace.metadata.world_size = 2;
  EXPECT_FALSE(SeparateWaiting({&traces[0], &traces[1]})[1].includes_waiting);
  // The same rank twice tells nothing.
  traces[1].metadata.rank = 0;
  const std::vector<CollectiveTime> twice =
      SeparateWaiting({&traces[0], &traces[1]});
  EXPECT_EQ(twice[1].waiting_ns, 0);
  EXPECT_TRUE(twice[1].includes_waiting);
}

TEST(CollectiveWaitingTest, GroupsWithoutANameAreNotMatchedWithEachOther) {
  std::vector<ImportedTrace> traces;
  for (int64_t rank = 0; rank < 4; ++rank) {
    traces.push_back(Import(Collective(0, rank < 2 ? 100 : 10)));
    traces.back().metadata.rank = rank;
    traces.back().collectives[0].process_group = 0;
  }
  for (const CollectiveTime& time :
       SeparateWaiting({&traces[0], &traces[1], &traces[2], &traces[3]})) {
    EXPECT_EQ(time.transfer_ns, time.trace < 2 ? 100000 : 10000);
    EXPECT_TRUE(time.includes_waiting);
  }
}

ProfileInput Rank(int64_t rank, const std::string& events) {
  ProfileInput input;
  input.trace = Import(events);
  input.trace.metadata.rank = rank;
  input.trace.metadata.world_size = 2;
  input.trace.metadata.device_names = {"NVIDIA H100"};
  input.name = absl::StrCat("rank", rank, ".json");
  return input;
}

TEST(ProfileBuilderTest, PointsOfOpsLayersAndCollectives) {
  const std::string layer =
      "pw:module=m,layer=transformer,pass=forward,tokens=64";
  const auto step = [&layer](int at, int collective_ns) {
    return absl::StrCat(
        Host("user_annotation", "step", 1, at, 80), ",",
        Host("user_annotation", layer, 1, at + 1, 50), ",",
        Host("cpu_op", "aten::mm", 1, at + 2, 30,
             R"("Input Dims":[[64, 8],[8, 8]],"Input type":["float"])"),
        ",", Launch(1, at + 3, at + 3), ",", Launch(1, at + 4, at + 4), ",",
        Launch(1, at + 60, at + 60), ",",
        Kernel("gemm", at + 20, 7, Correlation(at + 3)), ",",
        Kernel("splitk", at + 30, 2, Correlation(at + 4)), ",",
        Kernel("other", at + 70, 4, Correlation(at + 60)), ",",
        Collective(at + 90, collective_ns));
  };
  std::vector<ProfileInput> inputs;
  inputs.push_back(Rank(0, absl::StrCat(step(0, 50), ",", step(1000, 60))));
  inputs.push_back(Rank(1, absl::StrCat(step(0, 20), ",", step(1000, 90))));
  const absl::StatusOr<v1::Profile> profile = BuildProfile(inputs, 3);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_TRUE(ValidateProfile(*profile).ok()) << ValidateProfile(*profile);
  EXPECT_EQ(profile->version(), 3);
  ASSERT_EQ(profile->sources_size(), 2);
  EXPECT_EQ(profile->sources(1).rank(), 1);
  EXPECT_EQ(profile->sources(0).kernels(), 8);
  EXPECT_EQ(profile->sources(0).unmatched_kernels(), 2);

  ASSERT_EQ(profile->points_size(), 4);
  for (const v1::MeasuredPoint& point : profile->points()) {
    SCOPED_TRACE(point.ShortDebugString());
    EXPECT_EQ(point.count(), 4);
    EXPECT_EQ(point.key().device(), "NVIDIA H100");
    switch (point.key().kind()) {
      case v1::POINT_KIND_OP:
        EXPECT_EQ(point.key().name(), "aten::mm");
        EXPECT_EQ(point.key().input_shapes(), "[[64,8],[8,8]]");
        EXPECT_EQ(point.median_ns(), 9000);
        break;
      case v1::POINT_KIND_LAYER:
        EXPECT_EQ(point.key().layer().tokens(), 64);
        EXPECT_EQ(point.total_ns(), 4 * 9000);
        break;
      case v1::POINT_KIND_ANNOTATION:
        EXPECT_EQ(point.key().name(), "step");
        EXPECT_EQ(point.max_ns(), 13000);
        break;
      default:
        EXPECT_EQ(point.key().name(), "all_reduce");
        EXPECT_EQ(point.key().bytes(), 4096);
        EXPECT_EQ(point.key().group_size(), 2);
        EXPECT_EQ(point.min_ns(), 20000);
        EXPECT_EQ(point.max_ns(), 60000);
        EXPECT_EQ(point.waiting_ns(), 30000 + 30000);
        EXPECT_FALSE(point.includes_waiting());
    }
  }
}

// The layer points of two ranks' pass with a gemm of 3 ms and an all-reduce of
// two members, 5 ms long on rank 0 and 4 ms on rank 1.
std::vector<v1::MeasuredPoint> LayersWithAllReduce(
    const std::string& parallelism, int ranks = 2) {
  std::vector<ProfileInput> inputs;
  for (int rank = 0; rank < ranks; ++rank) {
    inputs.push_back(Rank(
        rank, absl::StrCat(
                  Host("user_annotation", "step", 1, 0, 90), ",",
                  Host("user_annotation",
                       "pw:module=m,layer=transformer,pass=forward,tokens=64" +
                           parallelism,
                       1, 1, 50),
                  ",", Launch(1, 3, 1), ",", Launch(1, 4, 2), ",",
                  Kernel("gemm", 100, 3000, Correlation(1)), ",",
                  Collective(4000, 5000 - 1000 * rank, Correlation(2) + ","))));
  }
  const absl::StatusOr<v1::Profile> profile = BuildProfile(inputs, 1);
  EXPECT_TRUE(profile.ok()) << profile.status();
  std::vector<v1::MeasuredPoint> layers;
  for (const v1::MeasuredPoint& point : profile->points()) {
    if (point.key().kind() == v1::POINT_KIND_LAYER) layers.push_back(point);
    if (point.key().kind() == v1::POINT_KIND_ANNOTATION) {
      EXPECT_EQ(point.max_ns(), 3'000'000) << "collectives apart";
    }
  }
  return layers;
}

TEST(ProfileBuilderTest, LayersHoldTheTransferOfTheirCollectives) {
  for (const char* parallelism : {",tp=2,cp=1", ",tp=1,cp=2", ""}) {
    const std::vector<v1::MeasuredPoint> layers =
        LayersWithAllReduce(parallelism);
    ASSERT_EQ(layers.size(), 1u) << parallelism;
    EXPECT_EQ(layers[0].count(), 2);
    EXPECT_EQ(layers[0].min_ns(), 7'000'000);
    EXPECT_EQ(layers[0].max_ns(), 7'000'000);
    EXPECT_FALSE(layers[0].includes_waiting());
  }
  const std::vector<v1::MeasuredPoint> alone =
      LayersWithAllReduce(",tp=2,cp=1", /*ranks=*/1);
  ASSERT_EQ(alone.size(), 1u);
  EXPECT_EQ(alone[0].max_ns(), 8'000'000);
  EXPECT_TRUE(alone[0].includes_waiting());
}

TEST(ProfileBuilderTest, CollectivesOfOtherGroupsAreNoPartOfALayer) {
  for (const char* parallelism : {",tp=1,cp=1", ",tp=4,cp=1", ",tp=4,cp=4"}) {
    const std::vector<v1::MeasuredPoint> layers =
        LayersWithAllReduce(parallelism, /*ranks=*/1);
    ASSERT_EQ(layers.size(), 1u) << parallelism;
    EXPECT_EQ(layers[0].max_ns(), 3'000'000) << parallelism;
    EXPECT_FALSE(layers[0].includes_waiting());
  }
}

TEST(ProfileBuilderTest, RangesThatAreNoValidLayersGoByName) {
  const auto range = [](const std::string& name, int at, int kernel_us) {
    return absl::StrCat(
        Host("user_annotation", name, 1, at, 50), ",",
        Launch(1, at + 3, at + 3), ",",
        Kernel("gemm", at + 20, kernel_us, Correlation(at + 3)));
  };
  const std::string layer = "pw:module=m,layer=l,pass=forward,";
  std::vector<ProfileInput> inputs;
  inputs.push_back(
      Rank(0, absl::StrCat(range(layer + "items=4", 0, 5), ",",
                           range(layer + "tokens=64,tp=2000", 100, 5), ",",
                           range(layer + "tokens=64,max_tokens=65", 200, 5))));
  const absl::StatusOr<v1::Profile> profile = BuildProfile(inputs, 1);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_TRUE(ValidateProfile(*profile).ok()) << ValidateProfile(*profile);
  ASSERT_EQ(profile->points_size(), 3);
  int layers = 0;
  for (const v1::MeasuredPoint& point : profile->points()) {
    layers += point.key().kind() == v1::POINT_KIND_LAYER;
  }
  EXPECT_EQ(layers, 1) << "what is not given bounds nothing";
}

class ProfileFileTest : public ::testing::Test {
 protected:
  std::string Path(const std::string& name) const {
    return absl::StrCat(::testing::TempDir(), "/", name);
  }
};

TEST_F(ProfileFileTest, WritesWhatItReadsAndNeverReplaces) {
  std::vector<ProfileInput> inputs;
  inputs.push_back(Rank(0, Collective(0, 5)));
  const v1::Profile profile = *BuildProfile(inputs, 1);
  const std::string path = Path("profile.textproto");
  unlink(path.c_str());
  ASSERT_TRUE(WriteProfileFile(profile, path).ok());
  const absl::StatusOr<v1::Profile> read = ReadProfileFile(path);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->SerializeAsString(), profile.SerializeAsString());
  EXPECT_EQ(WriteProfileFile(profile, path).code(),
            absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(WriteProfileFile(profile, "/nonexistent/x").code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(ProfileFileTest, ErrorsNameTheField) {
  const auto message = [](const std::string& text) {
    return std::string(ParseProfile(text, "p").status().message());
  };
  EXPECT_EQ(message(""), "p: format_version: 0, must be 1");
  EXPECT_EQ(message("format_version: 1"), "p: version: 0, must be at least 1");
  EXPECT_THAT(message("format_version: x"), ::testing::HasSubstr("p:1:17: "));
  const std::string head = "format_version: 1 version: 1 ";
  EXPECT_EQ(message(head + "points { }"), "p: points[0]: key.kind: not set");
  EXPECT_EQ(message(head + "points { key { kind: POINT_KIND_OP } }"),
            "p: points[0]: count: 0, must be at least 1");
  const std::string point =
      "points { key { kind: POINT_KIND_OP } count: 1 min_ns: 2 median_ns: 2 "
      "max_ns: 2 total_ns: 2 } ";
  EXPECT_EQ(message(head + point), "");
  EXPECT_EQ(message(head + point + point),
            "p: points[1]: key: kind: POINT_KIND_OP, is that of an earlier "
            "point: must be unique");
  EXPECT_THAT(
      message(head +
              "points { key { kind: POINT_KIND_OP } count: 1 min_ns: 3 }"),
      ::testing::HasSubstr("points[0]: times: must satisfy"));
}

// Four ranks of one real run.
TEST(ReferenceProfileTest, RanksOfARealRunSeparateWaiting) {
  const char* shared = std::getenv("PIPEWEAVER_SHARED");
  const std::filesystem::path traces =
      std::filesystem::path(shared != nullptr ? shared : "../shared") /
      "traces";
  std::vector<ProfileInput> inputs;
  for (int rank = 0; rank < 4; ++rank) {
    const std::filesystem::path path =
        traces / absl::StrCat("v100_dlrm_train_rank", rank, "of8.json.gz");
    if (!std::filesystem::exists(path))
      GTEST_SKIP() << "skipped: " << path << " missing";
    absl::StatusOr<ImportedTrace> trace = ImportTraceFile(path.string());
    ASSERT_TRUE(trace.ok()) << trace.status();
    inputs.push_back({*std::move(trace), path.filename().string(), ""});
  }
  const absl::StatusOr<v1::Profile> profile = BuildProfile(inputs, 1);
  ASSERT_TRUE(profile.ok()) << profile.status();
  ASSERT_TRUE(ValidateProfile(*profile).ok());
  int64_t transfer_ns = 0;
  int64_t waiting_ns = 0;
  int64_t operators = 0;
  for (const v1::MeasuredPoint& point : profile->points()) {
    operators += point.key().kind() == v1::POINT_KIND_OP;
    if (point.key().kind() != v1::POINT_KIND_COLLECTIVE) continue;
    // Four of eight ranks: the least of theirs may still wait for the others.
    EXPECT_TRUE(point.includes_waiting()) << point.ShortDebugString();
    transfer_ns += point.total_ns();
    waiting_ns += point.waiting_ns();
  }
  // All of the four ranks' NCCL time is one or the other.
  EXPECT_EQ(transfer_ns + waiting_ns,
            int64_t{5798 + 11336 + 3492 + 9774} * 1000);
  EXPECT_GT(waiting_ns, transfer_ns) << "ranks 1 and 3 mostly wait";
  EXPECT_GT(operators, 50);
}

}  // namespace
}  // namespace pipeweaver::profiler
