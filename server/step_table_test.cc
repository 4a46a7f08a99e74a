#include "server/step_table.h"

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr Clock::TimePoint kStart{std::chrono::hours(1)};

Clock::TimePoint At(int milliseconds) {
  return kStart + std::chrono::milliseconds(milliseconds);
}

std::shared_ptr<StepRequest> MakeRequest(uint64_t step,
                                         const std::string& batch = "batch",
                                         uint64_t attempt = 1) {
  auto job = std::make_shared<RegisteredJob>();
  job->name = "vlm";
  job->job_digest = "job";
  job->layout_digest = "layout";
  job->attempt = attempt;
  auto request = std::make_shared<StepRequest>();
  request->key = {"vlm", attempt, step, 0};
  request->job = job;
  request->batch_digest = batch;
  request->batch_bytes = 10;
  return request;
}

std::shared_ptr<const SealedPlan> MakePlan(
    const StepRequest& request, PlanOrigin origin = PlanOrigin::kSearchFinished,
    size_t bytes = 1) {
  auto plan = std::make_shared<SealedPlan>();
  plan->identity.key = request.key;
  plan->identity.job_digest = request.job->job_digest;
  plan->identity.layout_digest = request.job->layout_digest;
  plan->identity.batch_digest = request.batch_digest;
  plan->identity.profile_digest = "profile";
  plan->identity.origin = origin;
  plan->programs = {std::string(bytes, 'a'), "b"};
  return plan;
}

class StepTableTest : public ::testing::Test {
 protected:
  static StepTable::Options Options() {
    StepTable::Options options;
    options.max_steps_per_replica = 3;
    options.max_plan_bytes = 100'000;
    return options;
  }
  StepTableTest()
      : table_(Options(), [this](const StepKey& key) {
          gave_way_.push_back(DebugString(key));
        }) {
    table_.BeginAttempt("vlm", 1);
  }

  std::shared_ptr<const PendingStep> Submit(uint64_t step) {
    return table_.Submit(MakeRequest(step)).value();
  }
  std::shared_ptr<const SealedPlan> SubmitAndSeal(uint64_t step, int at = 0) {
    const auto pending = Submit(step);
    auto plan = MakePlan(*pending->request);
    EXPECT_TRUE(table_.Seal(*pending, plan, At(at)));
    return plan;
  }
  // What a read gets now; fails the test when it would wait.
  StepResult ReadNow(uint64_t step, uint64_t attempt = 1) {
    std::optional<StepResult> got;
    EXPECT_EQ(table_.Read({"vlm", attempt, step, 0},
                          [&got](const StepResult& result) { got = result; }),
              0);
    return got.value_or(absl::InternalError("waits"));
  }

  std::vector<std::string> gave_way_;
  StepTable table_;
};

TEST_F(StepTableTest, ReadsWaitForTheSealAndAllGetTheSamePlan) {
  const auto pending = Submit(5);
  StepResult first = nullptr;
  EXPECT_NE(table_.Read({"vlm", 1, 5, 0},
                        [&first](const StepResult& result) { first = result; }),
            0);
  EXPECT_EQ(*first, nullptr);
  const auto plan = MakePlan(*pending->request);
  EXPECT_TRUE(table_.Seal(*pending, plan, At(0)));
  EXPECT_EQ(*first, plan);
  EXPECT_EQ(*ReadNow(5), plan);
}

TEST_F(StepTableTest, TheSecondSealIsTurnedAway) {
  const auto pending = Submit(5);
  const auto plan = MakePlan(*pending->request);
  bool counted = false;
  EXPECT_TRUE(table_.Seal(*pending, plan, At(0)));
  EXPECT_TRUE(pending->cancelled->load());
  EXPECT_FALSE(table_.Seal(*pending, MakePlan(*pending->request), At(0),
                           [&counted] { counted = true; }));
  EXPECT_FALSE(counted);
  EXPECT_EQ(*ReadNow(5), plan);
}

TEST_F(StepTableTest, SameBatchAgainIsFineAndAnotherIsNot) {
  Submit(5);
  EXPECT_EQ(*table_.Submit(MakeRequest(5)), nullptr);
  const auto other = table_.Submit(MakeRequest(5, "other")).status();
  EXPECT_EQ(other.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(other.message()), HasSubstr("batch: job 'vlm'"));
  SubmitAndSeal(6);
  EXPECT_EQ(*table_.Submit(MakeRequest(6)), nullptr);
  EXPECT_EQ(table_.Submit(MakeRequest(6, "other")).status().code(),
            absl::StatusCode::kAlreadyExists);
}

TEST_F(StepTableTest, ANewAttemptEndsTheOldOne) {
  const auto pending = Submit(5);
  StepResult waiting = nullptr;
  table_.Read({"vlm", 1, 5, 0},
              [&waiting](const StepResult& result) { waiting = result; });
  table_.BeginAttempt("vlm", 2);
  EXPECT_EQ(waiting.status().code(), absl::StatusCode::kAborted);
  EXPECT_TRUE(pending->cancelled->load());
  EXPECT_FALSE(table_.Seal(*pending, MakePlan(*pending->request), At(0)));
  EXPECT_EQ(table_.Submit(MakeRequest(6)).status().code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(ReadNow(5).status().code(), absl::StatusCode::kAborted);
  // Steps may go back now.
  EXPECT_TRUE(table_.Submit(MakeRequest(2, "batch", 2)).ok());
  EXPECT_EQ(table_.Submit(MakeRequest(2, "batch", 3)).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(StepTableTest, RemovalAnswersThoseWhoWait) {
  Submit(5);
  StepResult waiting = nullptr;
  table_.Read({"vlm", 1, 5, 0},
              [&waiting](const StepResult& result) { waiting = result; });
  table_.EndJob("vlm");
  EXPECT_EQ(waiting.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(waiting.status().message()), HasSubstr("removed"));
  EXPECT_EQ(table_.held().steps, 0);
  EXPECT_EQ(ReadNow(5).status().code(), absl::StatusCode::kNotFound);
}

TEST_F(StepTableTest, AFullWindowRefusesUntilTheOldestStepIsSealed) {
  const auto oldest = Submit(0);
  SubmitAndSeal(1);
  SubmitAndSeal(2);
  const auto full = table_.Submit(MakeRequest(3)).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("max_steps_per_replica"));
  // Ranks that never read it do not keep later steps out.
  table_.Seal(*oldest, MakePlan(*oldest->request), At(0));
  EXPECT_TRUE(table_.Submit(MakeRequest(3)).ok());
  EXPECT_THAT(std::string(ReadNow(0).status().message()),
              HasSubstr("has expired"));
  EXPECT_EQ(table_.Submit(MakeRequest(0)).status().code(),
            absl::StatusCode::kOutOfRange);
  EXPECT_EQ(table_.HeldSteps("vlm"), 3);
}

TEST_F(StepTableTest, AStepWithinTheWindowGivesWayWhenAllRanksHaveReadIt) {
  SubmitAndSeal(0);
  SubmitAndSeal(2);
  SubmitAndSeal(3);
  EXPECT_FALSE(table_.Submit(MakeRequest(1)).ok());
  table_.NoteFetched({"vlm", 1, 0, 0}, 0);
  EXPECT_FALSE(table_.Submit(MakeRequest(1)).ok());
  table_.NoteFetched({"vlm", 1, 0, 0}, 1);
  EXPECT_TRUE(table_.Submit(MakeRequest(1)).ok());
}

TEST_F(StepTableTest, AReportedOrFailedStepCountsAsUsed) {
  SubmitAndSeal(0);
  EXPECT_TRUE(table_.NoteReported({"vlm", 1, 0, 0}, 1));
  EXPECT_FALSE(table_.NoteReported({"vlm", 1, 0, 0}, 1));
  const auto failed = Submit(1);
  table_.Seal(*failed, absl::ResourceExhaustedError("does not fit"), At(0));
  Submit(2);
  EXPECT_TRUE(table_.Submit(MakeRequest(3)).ok());
  EXPECT_TRUE(table_.Submit(MakeRequest(4)).ok());
  EXPECT_FALSE(table_.Submit(MakeRequest(5)).ok());
}

TEST_F(StepTableTest, StepsFarBehindAreRefused) {
  Submit(10);
  EXPECT_TRUE(table_.Submit(MakeRequest(8)).ok());
  const auto behind = table_.Submit(MakeRequest(7)).status();
  EXPECT_EQ(behind.code(), absl::StatusCode::kOutOfRange);
  EXPECT_THAT(std::string(behind.message()), HasSubstr("window of 3"));
}

TEST_F(StepTableTest, AStepThatWasNotSubmittedIsNotFound) {
  const auto status = ReadNow(9).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("was not submitted"));
}

TEST_F(StepTableTest, CancelledReadsCancelNothingElse) {
  const auto pending = Submit(5);
  StepResult first = nullptr;
  StepResult second = nullptr;
  const uint64_t handle = table_.Read(
      {"vlm", 1, 5, 0}, [&first](const StepResult& result) { first = result; });
  table_.Read({"vlm", 1, 5, 0},
              [&second](const StepResult& result) { second = result; });
  table_.CancelRead({"vlm", 1, 5, 0}, handle);
  EXPECT_EQ(first.status().code(), absl::StatusCode::kCancelled);
  EXPECT_FALSE(pending->cancelled->load());
  const auto plan = MakePlan(*pending->request);
  EXPECT_TRUE(table_.Seal(*pending, plan, At(0)));
  EXPECT_EQ(*second, plan);
  table_.CancelRead({"vlm", 1, 5, 0}, handle);
}

TEST_F(StepTableTest, AStepIsWithdrawnOnlyBeforeItIsSealed) {
  const auto pending = Submit(5);
  StepResult waiting = nullptr;
  table_.Read({"vlm", 1, 5, 0},
              [&waiting](const StepResult& result) { waiting = result; });
  EXPECT_TRUE(table_.Cancel({"vlm", 1, 5, 0}).ok());
  EXPECT_EQ(waiting.status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(pending->cancelled->load());
  // Withdrawn and submitted again, the old search cannot seal the new step.
  const auto again = table_.Submit(MakeRequest(5, "other")).value();
  EXPECT_FALSE(table_.Seal(*pending, MakePlan(*pending->request), At(0)));
  EXPECT_TRUE(table_.Seal(*again, MakePlan(*again->request), At(0)));
  EXPECT_EQ(table_.Cancel({"vlm", 1, 5, 0}).code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(StepTableTest, PlansExpire) {
  SubmitAndSeal(0, 0);
  SubmitAndSeal(1, 100);
  EXPECT_EQ(table_.NextEvent(), At(600'000));
  table_.DropExpired(At(600'000));
  EXPECT_THAT(std::string(ReadNow(0).status().message()),
              HasSubstr("has expired"));
  EXPECT_TRUE(ReadNow(1).ok());
}

TEST_F(StepTableTest, PlansForMuchLaterStepsAreKeptUntilTheyAreNeeded) {
  auto request = MakeRequest(0);
  request->seal_at = At(10'000'000);
  const auto pending = table_.Submit(request).value();
  ASSERT_TRUE(table_.Seal(*pending, MakePlan(*request), At(0)));
  SubmitAndSeal(1, 100);
  EXPECT_EQ(table_.NextEvent(), At(600'100));
  table_.DropExpired(At(600'100));
  EXPECT_TRUE(ReadNow(0).ok());
  EXPECT_FALSE(ReadNow(1).ok());
  EXPECT_EQ(table_.NextEvent(), At(10'600'000));
  table_.DropExpired(At(10'600'000));
  EXPECT_THAT(std::string(ReadNow(0).status().message()),
              HasSubstr("has expired"));
  EXPECT_EQ(table_.NextEvent(), std::nullopt);
}

TEST_F(StepTableTest, BytesAreBoundedAndTheOldestGoFirst) {
  const auto Seal = [this](uint64_t step) {
    const auto pending = Submit(step);
    table_.Seal(
        *pending,
        MakePlan(*pending->request, PlanOrigin::kSearchFinished, 40'000),
        At(0));
  };
  Seal(0);
  Seal(1);
  EXPECT_TRUE(ReadNow(0).ok());
  Seal(2);
  EXPECT_EQ(ReadNow(0).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(ReadNow(1).ok());
  EXPECT_LE(table_.held().plan_bytes, 100'000);
  EXPECT_GE(table_.held().plan_bytes, 80'000);
}

TEST_F(StepTableTest, WaitingBatchesAreBounded) {
  auto request = MakeRequest(0);
  request->batch_bytes = 99'995;
  EXPECT_TRUE(table_.Submit(request).ok());
  const auto full = table_.Submit(MakeRequest(1)).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("max_plan_bytes"));
  EXPECT_TRUE(table_.Cancel(request->key).ok());
  EXPECT_TRUE(table_.Submit(MakeRequest(1)).ok());
}

TEST_F(StepTableTest, UsedPlansGoFirstThenThoseOfTheJobWithMost) {
  const auto seal = [this](const std::string& job, uint64_t step) {
    auto request = MakeRequest(step);
    request->key.job = job;
    const auto pending = table_.Submit(request).value();
    EXPECT_TRUE(table_.Seal(
        *pending, MakePlan(*request, PlanOrigin::kSearchFinished, 30'000),
        At(0)));
  };
  const auto held = [this](const std::string& job, uint64_t step) {
    return table_.Peek({job, 1, step, 0}).ok();
  };
  table_.BeginAttempt("big", 1);
  seal("vlm", 0);
  seal("big", 0);
  seal("big", 1);
  table_.NoteReported({"big", 1, 1, 0}, 0);
  seal("big", 2);  // a fourth is more than fits
  EXPECT_FALSE(held("big", 1));
  EXPECT_THAT(gave_way_, IsEmpty()) << "it was used";
  seal("big", 3);
  EXPECT_FALSE(held("big", 0)) << "the oldest of the job with most";
  EXPECT_TRUE(held("vlm", 0));
  EXPECT_TRUE(held("big", 2) && held("big", 3));
  EXPECT_THAT(gave_way_, ElementsAre(DebugString(StepKey{"big", 1, 0, 0})));
}

TEST_F(StepTableTest, DueStepsAreTakenOnceInTheirOrder) {
  auto later = MakeRequest(0);
  later->seal_at = At(20);
  auto sooner = MakeRequest(1);
  sooner->seal_at = At(10);
  const auto first = table_.Submit(later).value();
  const auto second = table_.Submit(sooner).value();
  EXPECT_EQ(table_.NextEvent(), At(10));
  EXPECT_TRUE(table_.TakeDue(At(9)).empty());
  EXPECT_THAT(table_.TakeDue(At(20)), ElementsAre(second, first));
  EXPECT_TRUE(table_.TakeDue(At(20)).empty());
  EXPECT_EQ(table_.NextEvent(), std::nullopt);
}

TEST_F(StepTableTest, FindsTheLatestPlanAndThatOfALikeBatch) {
  const auto pending = Submit(0);
  EXPECT_EQ(table_.Latest(*pending->request), nullptr);
  const auto plan = MakePlan(*pending->request);
  table_.Seal(*pending, plan, At(0));
  const auto next = MakeRequest(1, "unlike");
  EXPECT_EQ(table_.Latest(*next), plan);
  EXPECT_EQ(table_.Like(*next, "profile"), nullptr);
  EXPECT_EQ(table_.Like(*MakeRequest(1), "profile"), plan);
  EXPECT_EQ(table_.Like(*MakeRequest(1), "other profile"), nullptr);
  // A safe program is no start for a search.
  const auto safe = table_.Submit(MakeRequest(2, "unlike")).value();
  table_.Seal(*safe, MakePlan(*safe->request, PlanOrigin::kSafe), At(0));
  EXPECT_EQ(table_.Latest(*MakeRequest(1)), plan);
  EXPECT_EQ(table_.Like(*next, "profile"), nullptr);
  table_.DropExpired(At(600'000));
  EXPECT_EQ(table_.Like(*MakeRequest(3), "profile"), nullptr);
}

TEST_F(StepTableTest, PeekDoesNotWait) {
  const auto pending = Submit(0);
  EXPECT_EQ(table_.Peek({"vlm", 1, 0, 0}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  const auto plan = MakePlan(*pending->request);
  table_.Seal(*pending, plan, At(0));
  EXPECT_EQ(*table_.Peek({"vlm", 1, 0, 0}), plan);
}

TEST_F(StepTableTest, AbandonAnswersAllThatWaitAndKeepsWhatIsSealed) {
  SubmitAndSeal(0);
  Submit(1);
  StepResult waiting = nullptr;
  table_.Read({"vlm", 1, 1, 0},
              [&waiting](const StepResult& result) { waiting = result; });
  table_.AbandonPending(absl::UnavailableError("bye"));
  EXPECT_EQ(waiting.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(ReadNow(0).ok());
  EXPECT_EQ(table_.held().steps, 1);
}

TEST_F(StepTableTest, SealsAllOrNone) {
  const auto first = Submit(1);
  const auto second = Submit(2);
  const std::vector<std::shared_ptr<const SealedPlan>> plans = {
      MakePlan(*first->request), MakePlan(*second->request)};
  int sealed = 0;
  const auto count = [&sealed] { ++sealed; };
  ASSERT_TRUE(table_.Cancel({"vlm", 1, 2, 0}).ok());
  EXPECT_FALSE(table_.SealAll({first, second}, plans, At(0), count));
  EXPECT_EQ(ReadNow(2).status().code(), absl::StatusCode::kNotFound);
  EXPECT_FALSE(table_.Peek({"vlm", 1, 1, 0}).ok());  // still waits
  const auto again = Submit(2);
  EXPECT_TRUE(table_.SealAll({first, again}, plans, At(0), count));
  EXPECT_EQ(*ReadNow(1), plans[0]);
  EXPECT_EQ(*ReadNow(2), plans[1]);
  EXPECT_TRUE(first->cancelled->load());
  EXPECT_FALSE(table_.SealAll({first, again}, plans, At(0), count));
  EXPECT_EQ(sealed, 1);
}

TEST_F(StepTableTest, PlansOfMovedMicrobatchesServeNoOtherStep) {
  const auto pending = Submit(1);
  auto plan = std::make_shared<SealedPlan>(*MakePlan(*pending->request));
  plan->moved = true;
  ASSERT_TRUE(table_.Seal(*pending, plan, At(0)));
  EXPECT_EQ(table_.Like(*MakeRequest(2), "profile"), nullptr);
  EXPECT_EQ(table_.Latest(*MakeRequest(2)), nullptr);
}

}  // namespace
}  // namespace pipeweaver::server
