// Tests of the commands schedule and simulate: flags, exit codes, errors.

#include "server/ctl/schedule_command.h"

#include <fstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "server/ctl/testing/run_command.h"

namespace pipeweaver::ctl {
namespace {

using ::testing::HasSubstr;

TEST(ScheduleCommandTest, HelpTellsMore) {
  const Outcome schedule = Ctl(RunScheduleCommand, {"--help"});
  EXPECT_EQ(schedule.code, kExitOk);
  EXPECT_THAT(schedule.out, HasSubstr("--budget-evals"));
  const Outcome simulate = Ctl(RunSimulateCommand, {"--help"});
  EXPECT_EQ(simulate.code, kExitOk);
  EXPECT_THAT(simulate.out, HasSubstr("SCHEDULE"));
}

TEST(ScheduleCommandTest, WrongArgumentsAreUsage) {
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{
           {},
           {"p.json", "other.json"},
           {"p.json", "--nothing"},
           {"p.json", "--seed", "-1"},
           {"p.json", "--threads", "0"},
           {"p.json", "--budget-ms", "0"},
           {"p.json", "--budget-ms", "99999999999999999"},
           {"p.json", "--budget-ms", "5", "--budget-evals", "5"},
           {"p.json", "--strategy", "none"}}) {
    EXPECT_EQ(Ctl(RunScheduleCommand, args).code, kExitUsage)
        << ::testing::PrintToString(args);
  }
  EXPECT_EQ(Ctl(RunSimulateCommand, {"p.json"}).code, kExitUsage);
}

TEST(ScheduleCommandTest, NamesTheFileThatIsMissing) {
  const std::string path = ::testing::TempDir() + "/missing.json";
  for (const Outcome& outcome :
       {Ctl(RunScheduleCommand, {path, "--budget-ms=5"}),
        Ctl(RunSimulateCommand, {path, path})}) {
    EXPECT_EQ(outcome.code, kExitBadInput);
    const auto error = nlohmann::json::parse(outcome.err);
    EXPECT_EQ(error["field"], path);
    EXPECT_THAT(error["value"].get<std::string>(), HasSubstr("No such file"));
  }
}

TEST(ScheduleCommandTest, WhatAScheduleClaimsMustBeExact) {
  const std::string problem = ::testing::TempDir() + "/one_stage.json";
  std::ofstream(problem) << R"({"ranks": 1, "p2p_latency_ns": 0,
      "split_backward": false, "memory_limit_bytes": [9], "segments": [
      {"id": "a", "microbatch": 0, "stages": [{"rank": 0, "choices": [
      {"forward_ns": 1, "input_grad_ns": 1, "weight_grad_ns": 1,
       "activation_bytes": 9}]}]}]})";
  const std::string ranks = R"("ranks": [[
      {"kind": "F", "segment": "a", "stage": 0, "choice": 0},
      {"kind": "B", "segment": "a", "stage": 0, "choice": 0}]]})";
  const std::string path = ::testing::TempDir() + "/claims.json";
  const auto simulate = [&](const std::string& claim) {
    std::ofstream(path) << "{" << claim << ranks;
    return Ctl(RunSimulateCommand, {problem, path});
  };
  EXPECT_EQ(simulate("").code, kExitOk);
  EXPECT_EQ(simulate(R"("makespan_ns": 3, "lower_bound_ns": "3", )").code,
            kExitOk);
  EXPECT_EQ(simulate(R"("makespan_ns": "003", )").code, kExitOk);
  for (const std::string field : {"makespan_ns", "lower_bound_ns"}) {
    for (const std::string value : {"4", "-1", "\"x\"", "1.5"}) {
      const Outcome wrong = simulate("\"" + field + "\": " + value + ", ");
      EXPECT_EQ(wrong.code, kExitBadInput) << value;
      EXPECT_EQ(nlohmann::json::parse(wrong.err)["field"], field) << value;
    }
  }
}

TEST(ScheduleCommandTest, SimulatesWhatItScheduledPastTwoToThe63) {
  std::string stages;
  for (int i = 0; i < 10; ++i) {
    stages +=
        (i == 0 ? "{\"rank\": " : ", {\"rank\": ") + std::to_string(i % 2);
    stages += R"(, "transfer_ns": 900000000000000000, "choices": [
        {"forward_ns": 1, "input_grad_ns": 1, "weight_grad_ns": 0,
         "activation_bytes": 1}]})";
  }
  const std::string problem = ::testing::TempDir() + "/long.json";
  std::ofstream(problem) << R"({"ranks": 2, "p2p_latency_ns": 0,
      "split_backward": false, "memory_limit_bytes": [9, 9], "segments": [
      {"id": "a", "microbatch": 0, "stages": [)"
                         << stages << "]}]}";
  const Outcome scheduled =
      Ctl(RunScheduleCommand, {problem, "--budget-evals=5"});
  ASSERT_EQ(scheduled.code, kExitOk) << scheduled.err;
  EXPECT_THAT(scheduled.out,
              HasSubstr("\"makespan_ns\": 16200000000000000020"));
  const std::string path = ::testing::TempDir() + "/long_schedule.json";
  std::ofstream(path) << scheduled.out;
  const Outcome simulated = Ctl(RunSimulateCommand, {problem, path});
  EXPECT_EQ(simulated.code, kExitOk) << simulated.err;
}

TEST(ScheduleCommandTest, NamesTheLimitThatIsTooLow) {
  const std::string path = ::testing::TempDir() + "/too_low.json";
  std::ofstream(path) << R"({"ranks": 2, "p2p_latency_ns": 0,
      "split_backward": false, "memory_limit_bytes": [9, 8], "segments": [
      {"id": "a", "microbatch": 0, "stages": [{"rank": 1, "choices": [
      {"forward_ns": 1, "input_grad_ns": 1, "weight_grad_ns": 1,
       "activation_bytes": 9}]}]}]})";
  const Outcome outcome = Ctl(RunScheduleCommand, {path, "--budget-evals=5"});
  EXPECT_EQ(outcome.code, kExitBadInput);
  const auto error = nlohmann::json::parse(outcome.err);
  EXPECT_EQ(error["field"], "memory_limit_bytes[1]");
  EXPECT_EQ(error["value"], "8");
  EXPECT_EQ(error["rule"],
            "no schedule exists: rank 1 would hold 9 bytes, its limit is 8");
}

}  // namespace
}  // namespace pipeweaver::ctl
