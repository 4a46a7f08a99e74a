// Tests of planning, several replicas together, and of replaying that; and of
// what is refused.

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "pipeweaver/v1/planner_service.pb.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"
#include "server/ctl/command.h"
#include "server/ctl/planning_input.h"
#include "server/ctl/testing/run_command.h"

namespace pipeweaver::ctl {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

TEST(PlanCommandTest, ABatchHasItsOwnMicrobatches) {
  const Outcome outcome =
      Ctl(RunPlanCommand, {"vlm-s", "batch", "--microbatches", "4"});
  EXPECT_EQ(outcome.code, kExitUsage);
  EXPECT_THAT(outcome.err, HasSubstr("--microbatches"));
}

class MoveWithTest : public ::testing::Test {
 protected:
  MoveWithTest() {
    v1::Job job = *semu::MakeSetup("vlm-s");
    job.mutable_parallelism()->set_data_parallel(2);
    EXPECT_TRUE(WriteTextProto(job_, job).ok());
    for (const bool heavy : {false, true}) {
      semu::SampleOptions options;
      options.microbatches = 4;
      options.max_images = heavy ? 40 : 4;
      EXPECT_TRUE(WriteTextProto(heavy ? heavy_ : light_,
                                 *semu::SampleBatch(job, options))
                      .ok());
    }
  }

  const std::string job_ = ::testing::TempDir() + "/job.textproto";
  const std::string light_ = ::testing::TempDir() + "/light.textproto";
  const std::string heavy_ = ::testing::TempDir() + "/heavy.textproto";
  const std::string saved_ = ::testing::TempDir() + "/saved.textproto";
};

TEST_F(MoveWithTest, SaysWhereMicrobatchesComeFromAndReplays) {
  const Outcome plan =
      Ctl(RunPlanCommand, {job_, light_, "--move-with", heavy_,
                           "--budget-evals", "30", "--save", saved_});
  EXPECT_EQ(plan.code, 0) << plan.err;
  EXPECT_THAT(plan.out, HasSubstr("1/0"));
  for (const char* threads : {"1", "3"}) {
    const Outcome replay =
        Ctl(RunReplayCommand, {saved_, "--threads", threads});
    EXPECT_EQ(replay.code, 0) << replay.err;
    EXPECT_THAT(replay.out, HasSubstr("replica 1, rank 3: "));
    EXPECT_THAT(replay.out, Not(HasSubstr("differs")));
  }
  // Another batch is another plan.
  v1::SavedRequest saved;
  ASSERT_TRUE(ReadTextProto(saved_, saved).ok());
  *saved.mutable_other_replicas(0) = saved.batch();
  ASSERT_TRUE(WriteTextProto(saved_, saved).ok());
  const Outcome other = Ctl(RunReplayCommand, {saved_});
  EXPECT_EQ(other.code, 1);
  EXPECT_THAT(other.out, HasSubstr("differs"));
}

TEST_F(MoveWithTest, ALayoutIsProposedForSampleBatches) {
  const auto layout = [&](std::vector<std::string> more) {
    std::vector<std::string> args = {job_, light_,   "--budget-evals",
                                     "1",  "--save", saved_};
    args.insert(args.end(), more.begin(), more.end());
    const Outcome plan = Ctl(RunPlanCommand, args);
    EXPECT_EQ(plan.code, 0) << plan.err;
    v1::SavedRequest saved;
    EXPECT_TRUE(ReadTextProto(saved_, saved).ok());
    return saved.job().layout().SerializeAsString();
  };
  EXPECT_NE(layout({"--sample-batch", heavy_, heavy_, heavy_}), layout({}));
  // What was planned on it is replayed on it.
  EXPECT_EQ(Ctl(RunReplayCommand, {saved_}).code, 0);

  const Outcome missing = Ctl(
      RunPlanCommand, {job_, light_, "--sample-batch", heavy_, "no-such-file"});
  EXPECT_EQ(missing.code, kExitBadInput);
  EXPECT_THAT(missing.err, HasSubstr("no-such-file"));
}

TEST_F(MoveWithTest, ReplaysNoSearchWithoutABudget) {
  ASSERT_EQ(Ctl(RunPlanCommand,
                {job_, light_, "--budget-evals", "30", "--save", saved_})
                .code,
            0);
  v1::SavedRequest saved;
  ASSERT_TRUE(ReadTextProto(saved_, saved).ok());
  for (const int64_t budget : {0, -5}) {
    saved.set_budget_evaluations(budget);
    ASSERT_TRUE(WriteTextProto(saved_, saved).ok());
    const Outcome replay = Ctl(RunReplayCommand, {saved_});
    EXPECT_EQ(replay.code, kExitBadInput);
    EXPECT_THAT(replay.err, HasSubstr(absl::StrCat("budget_evaluations: ",
                                                   budget, ", must be above")));
  }
}

TEST_F(MoveWithTest, RefusesWhatCannotHold) {
  const Outcome three =
      Ctl(RunPlanCommand, {job_, light_, "--move-with", heavy_, light_});
  EXPECT_EQ(three.code, kExitBadInput);
  EXPECT_THAT(three.err, HasSubstr("batches: of 3 replicas, job"));
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{
           {job_, light_, "--move-with", heavy_, "--save", saved_},
           {job_, light_, "--save", saved_}}) {
    const Outcome timed = Ctl(RunPlanCommand, args);
    EXPECT_EQ(timed.code, kExitBadInput);
    EXPECT_THAT(timed.err, HasSubstr("--save: needs --budget-evals"));
  }
  const Outcome baseline = Ctl(
      RunPlanCommand, {job_, light_, "--strategy", "1f1b", "--save", saved_});
  EXPECT_EQ(baseline.code, 0) << baseline.err;
  EXPECT_EQ(Ctl(RunReplayCommand, {saved_}).code, 0);
}

TEST_F(MoveWithTest, WrongArgumentsAreUsage) {
  for (const std::vector<std::string>& flags :
       std::vector<std::vector<std::string>>{
           {"--seed", "-1"},
           {"--budget-ms", "99999999999999999"},
           {"--budget-evals", "0"},
           {"--budget-ms", "5", "--budget-evals", "5"},
           {"--strategy", "none"}}) {
    std::vector<std::string> args = {job_, light_};
    args.insert(args.end(), flags.begin(), flags.end());
    EXPECT_EQ(Ctl(RunPlanCommand, args).code, kExitUsage)
        << ::testing::PrintToString(args);
  }
  EXPECT_EQ(
      Ctl(RunCompareCommand, {job_, light_, "--strategies", "list,none"}).code,
      kExitUsage);
}

TEST_F(MoveWithTest, AFolderIsNoInput) {
  const std::string folder = ::testing::TempDir();
  for (const Outcome& outcome :
       {Ctl(RunPlanCommand, {folder}), Ctl(RunPlanCommand, {job_, folder}),
        Ctl(RunReplayCommand, {folder})}) {
    EXPECT_EQ(outcome.code, kExitBadInput);
    EXPECT_THAT(outcome.err, HasSubstr("is a folder"));
  }
}

}  // namespace
}  // namespace pipeweaver::ctl
