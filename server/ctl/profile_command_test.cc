// Tests of the profile command.

#include "server/ctl/profile_command.h"

#include <unistd.h>

#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "profiler/profile_file.h"

namespace pipeweaver::server {
namespace {

using ::testing::HasSubstr;

struct Outcome {
  int code;
  std::string out;
  std::string err;
};

Outcome Run(const std::vector<std::string>& args) {
  std::ostringstream out;
  std::ostringstream err;
  const int code = RunProfileCommand(args, out, err);
  return {code, out.str(), err.str()};
}

std::string WriteFile(const std::string& name, const std::string& text) {
  const std::string path = ::testing::TempDir() + "/" + name;
  std::ofstream(path) << text;
  return path;
}

std::string Trace() {
  return WriteFile("trace.json",
                   R"({"traceEvents": [
      {"ph":"X","cat":"kernel","name":"k","ts":1,"dur":2.5,"args":{"device":0,"correlation":3}},
      {"ph":"X","cat":"kernel","name":"bad","ts":1},
      {"ph":"X","cat":"cuda_runtime","name":"l","pid":1,"tid":1,"ts":0.5,"dur":1,"args":{"correlation":3}},
      {"ph":"X","cat":"cpu_op","name":"aten::mm","pid":1,"tid":1,"ts":0.1,"dur":3}]})");
}

TEST(ProfileImportTest, PrintsFiguresAsJson) {
  const Outcome one = Run({"import", "-o", "json", Trace()});
  EXPECT_EQ(one.code, 0) << one.err;
  const nlohmann::json json = nlohmann::json::parse(one.out, nullptr, false);
  EXPECT_EQ(json["kernels"], 1);
  EXPECT_EQ(json["busy_ns"], 2500);
  EXPECT_EQ(json["unmatched_kernels"], 0);
  EXPECT_EQ(json["top10"], nlohmann::json::parse(R"([["k", 1, 2500]])"));
  EXPECT_THAT(
      one.err,
      HasSubstr("1 device records left out, the first: 'bad': dur is absent"));
  const nlohmann::json two = nlohmann::json::parse(
      Run({"import", Trace(), Trace(), "-o", "json"}).out, nullptr, false);
  EXPECT_EQ(two.size(), 2u);
  EXPECT_THAT(Run({"import", Trace()}).out, HasSubstr("device busy 2.5 us"));
}

TEST(ProfileImportTest, WritesAProfile) {
  const std::string path = ::testing::TempDir() + "/imported.textproto";
  unlink(path.c_str());
  const Outcome outcome =
      Run({"import", "--profile=" + path, "--version=4", Trace()});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  const absl::StatusOr<v1::Profile> profile = profiler::ReadProfileFile(path);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->version(), 4);
  EXPECT_EQ(profile->sources(0).name(), "trace.json");
  EXPECT_EQ(profile->sources(0).sha256().size(), 64u);
  EXPECT_EQ(profile->points(0).key().name(), "aten::mm");
  const Outcome again = Run({"import", "--profile=" + path, Trace()});
  EXPECT_EQ(again.code, 1);
  EXPECT_EQ(again.out, "");
}

TEST(ProfilePredictTest, FillsTheTimes) {
  const std::string table = WriteFile(
      "ops.csv",
      "gpu,model,hidden,ffn,heads,kv_heads,gated,tp,tokens,mlp_up_proj_us\n"
      "a100,m,4096,11008,32,32,True,1,2048,\n");
  const Outcome outcome = Run({"predict", table});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, ::testing::MatchesRegex(
                               "gpu,[a-z_,]*_us\na100,m,4096,11008,32,32,True,"
                               "1,2048,1[67][0-9][0-9]\\.[0-9]*\n"));
}

TEST(ProfileCommandTest, FailuresAndWrongCallsDiffer) {
  EXPECT_EQ(Run({}).code, 2);
  EXPECT_EQ(Run({"export"}).code, 2);
  EXPECT_EQ(Run({"import"}).code, 2);
  EXPECT_EQ(Run({"import", "-o", "xml", "t"}).code, 2);
  EXPECT_EQ(Run({"import", "-o"}).code, 2);
  EXPECT_EQ(Run({"import", "--version=0", "t"}).code, 2);
  EXPECT_EQ(Run({"import", "--fast", "t"}).code, 2);
  EXPECT_EQ(Run({"predict"}).code, 2);
  EXPECT_THAT(Run({"predict"}).err, HasSubstr("usage:"));
  const Outcome missing = Run({"import", "/nonexistent.json"});
  EXPECT_EQ(missing.code, 1);
  EXPECT_THAT(missing.err, HasSubstr("/nonexistent.json: No such file"));
  const Outcome truncated =
      Run({"import", WriteFile("cut.json", "{\"traceEvents\": [{")});
  EXPECT_EQ(truncated.code, 1);
  EXPECT_THAT(truncated.err,
              HasSubstr("cut.json: byte 18: the text breaks off"));
}

}  // namespace
}  // namespace pipeweaver::server
