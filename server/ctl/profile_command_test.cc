// Tests of the profile command.

#include "server/ctl/profile_command.h"

#include <unistd.h>

#include <fstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "profiler/profile_file.h"
#include "server/ctl/testing/run_command.h"

namespace pipeweaver::ctl {
namespace {

using ::testing::HasSubstr;

Outcome Profile(const std::vector<std::string>& args) {
  return Ctl(RunProfileCommand, args);
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
  const Outcome one = Profile({"import", "-o", "json", Trace()});
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
      Profile({"import", Trace(), Trace(), "-o", "json"}).out, nullptr, false);
  EXPECT_EQ(two.size(), 2u);
  EXPECT_THAT(Profile({"import", Trace()}).out,
              HasSubstr("device busy 2.5 us"));
}

TEST(ProfileImportTest, WritesAProfile) {
  const std::string path = ::testing::TempDir() + "/imported.textproto";
  unlink(path.c_str());
  const Outcome outcome =
      Profile({"import", "--profile", path, "--profile-version", "4", Trace()});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  const absl::StatusOr<v1::Profile> profile = profiler::ReadProfileFile(path);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->version(), 4);
  EXPECT_EQ(profile->sources(0).name(), "trace.json");
  EXPECT_EQ(profile->sources(0).sha256().size(), 64u);
  EXPECT_EQ(profile->points(0).key().name(), "aten::mm");
  const Outcome again = Profile({"import", "--profile", path, Trace()});
  EXPECT_EQ(again.code, kExitBadInput);
  EXPECT_EQ(again.out, "");
}

TEST(ProfilePredictTest, FillsTheTimes) {
  const std::string table = WriteFile(
      "ops.csv",
      "gpu,model,hidden,ffn,heads,kv_heads,gated,tp,tokens,mlp_up_proj_us\n"
      "a100,m,4096,11008,32,32,True,1,2048,\n");
  const Outcome outcome = Profile({"predict", table});
  EXPECT_EQ(outcome.code, 0) << outcome.err;
  EXPECT_THAT(outcome.out, ::testing::MatchesRegex(
                               "gpu,[a-z_,]*_us\na100,m,4096,11008,32,32,True,"
                               "1,2048,1[67][0-9][0-9]\\.[0-9]*\n"));
}

TEST(ProfileCommandTest, BadInputsAndWrongCallsDiffer) {
  for (const std::vector<std::string>& call :
       std::vector<std::vector<std::string>>{
           {},
           {"export"},
           {"import"},
           {"import", "-o", "xml", "t"},
           {"import", "-o"},
           {"import", "--profile-version", "0", "--profile", "p", "t"},
           {"import", "--profile-version", "2", "t"},
           {"import", "--fast", "t"},
           {"predict"},
           {"predict", "a", "b"}}) {
    EXPECT_EQ(Profile(call).code, kExitUsage);
  }
  const Outcome missing = Profile({"import", "/nonexistent.json"});
  EXPECT_EQ(missing.code, kExitBadInput);
  EXPECT_THAT(missing.err, HasSubstr("/nonexistent.json: No such file"));
  const Outcome truncated =
      Profile({"import", WriteFile("cut.json", "{\"traceEvents\": [{")});
  EXPECT_EQ(truncated.code, kExitBadInput);
  EXPECT_THAT(truncated.err,
              HasSubstr("cut.json: byte 18: the text breaks off"));
  EXPECT_EQ(Profile({"predict", "/nonexistent.csv"}).code, kExitBadInput);
}

}  // namespace
}  // namespace pipeweaver::ctl
