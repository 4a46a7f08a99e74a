#include "server/job_registry.h"

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::server {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

Registration MakeRegistration(const std::string& name,
                              const std::string& request_id,
                              const std::string& digest = "digest") {
  Registration registration;
  registration.request_id = request_id;
  registration.job.name = name;
  registration.job_digest = digest;
  return registration;
}

// Registers as the core does.
absl::StatusOr<std::shared_ptr<const RegisteredJob>> Register(
    JobRegistry& registry, const Registration& registration,
    const std::string& layout_digest = "layout") {
  auto known = registry.TryRegister(registration);
  if (!known.ok()) return known.status();
  if (known->has_value()) return **known;
  auto plannable = std::make_shared<search::PlannableJob>();
  plannable->job = registration.job;
  return registry.Commit(registration,
                         {plannable, layout_digest, "profile",
                          std::make_shared<CostVersion>(), nullptr});
}

PreparedJob Repriced(int64_t number, const std::string& layout = "layout") {
  CostVersion version;
  version.number = number;
  return {std::make_shared<search::PlannableJob>(), layout, "other profile",
          std::make_shared<CostVersion>(version), nullptr};
}

TEST(JobRegistryTest, NewCostsReplaceOlderOnesOfTheSameLayout) {
  JobRegistry registry(4);
  Register(registry, MakeRegistration("vlm", "a")).value();
  EXPECT_FALSE(registry.Reprice("t2v", Repriced(1)));
  EXPECT_FALSE(registry.Reprice("vlm", Repriced(1, "other layout")));
  EXPECT_FALSE(registry.Reprice("vlm", Repriced(0)));
  EXPECT_EQ((*registry.Find("vlm"))->profile_digest, "profile");
  EXPECT_TRUE(registry.Reprice("vlm", Repriced(2)));
  EXPECT_FALSE(registry.Reprice("vlm", Repriced(1))) << "an older one";
  EXPECT_EQ((*registry.Find("vlm"))->profile_digest, "other profile");
  EXPECT_EQ((*registry.Find("vlm"))->cost_version->number, 2);
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "b")))->profile_digest,
            "other profile")
      << "attempts go on with what is known";
}

TEST(JobRegistryTest, AttemptsCountStartsOfTheRun) {
  JobRegistry registry(4);
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "a")))->attempt, 1);
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "b")))->attempt, 2);
  EXPECT_EQ((*registry.Find("vlm"))->attempt, 2);
}

TEST(JobRegistryTest, TheSameRequestIdGetsTheSameAttempt) {
  JobRegistry registry(4);
  Register(registry, MakeRegistration("vlm", "a")).value();
  Register(registry, MakeRegistration("vlm", "b")).value();
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "b")))->attempt, 2);
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "a")))->attempt, 1);
  EXPECT_EQ((*registry.Find("vlm"))->attempt, 2);
}

TEST(JobRegistryTest, AnotherDigestIsAnotherJob) {
  JobRegistry registry(4);
  Register(registry, MakeRegistration("vlm", "a")).value();
  const auto status =
      Register(registry, MakeRegistration("vlm", "b", "other")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(status.message()), HasSubstr("job.name: 'vlm'"));
}

TEST(JobRegistryTest, RefusesMoreJobsThanItsLimit) {
  JobRegistry registry(1);
  Register(registry, MakeRegistration("vlm", "a")).value();
  const auto status = Register(registry, MakeRegistration("t2v", "a")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("max_jobs"));
  EXPECT_THAT(registry.Names(), ElementsAre("vlm"));
}

TEST(JobRegistryTest, AttemptsDoNotRepeatAfterRemoval) {
  JobRegistry registry(4);
  Register(registry, MakeRegistration("vlm", "a")).value();
  Register(registry, MakeRegistration("vlm", "b")).value();
  ASSERT_TRUE(registry.Remove("vlm").ok());
  EXPECT_EQ(registry.Find("vlm").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "c")))->attempt, 3);
}

TEST(JobRegistryTest, ARunKeepsTheAttemptThatTheRegistryForgot) {
  const auto Back = [](const std::string& request_id, uint64_t attempt) {
    Registration registration = MakeRegistration("vlm", request_id);
    registration.attempt = attempt;
    return registration;
  };
  // It was started again later than the one that handed out 50 and 51.
  JobRegistry registry(4, /*attempts_before=*/100);
  EXPECT_EQ((*Register(registry, Back("old", 50)))->attempt, 50);
  EXPECT_EQ((*Register(registry, Back("old", 50)))->attempt, 50);
  EXPECT_EQ((*Register(registry, Back("live", 51)))->attempt, 51);
  EXPECT_EQ((*Register(registry, Back("live", 51)))->attempt, 51);
  const auto over = Register(registry, Back("old", 50)).status();
  EXPECT_EQ(over.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(over.message()),
              HasSubstr("attempt: 50 of job 'vlm' is over, the latest is 51"));
  EXPECT_EQ(Register(registry, Back("other", 51)).status().code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "new")))->attempt,
            101);
  EXPECT_EQ(Register(registry, Back("live", 51)).status().code(),
            absl::StatusCode::kAborted);
  // Removed, both come back: the newer one stays.
  ASSERT_TRUE(registry.Remove("vlm").ok());
  EXPECT_EQ((*Register(registry, Back("live", 51)))->attempt, 51);
  EXPECT_EQ((*Register(registry, Back("new", 101)))->attempt, 101);
  EXPECT_EQ((*Register(registry, MakeRegistration("vlm", "last")))->attempt,
            102);
}

TEST(JobRegistryTest, WhatOneRunSaysOfItsAttemptIsNothingToOtherJobs) {
  JobRegistry registry(4);
  Registration far = MakeRegistration("vlm", "a");
  far.attempt = uint64_t{1} << 39;
  EXPECT_EQ((*Register(registry, far))->attempt, far.attempt);
  ASSERT_TRUE(registry.Remove("vlm").ok());
  EXPECT_EQ((*Register(registry, MakeRegistration("t2v", "a")))->attempt, 1);
}

TEST(JobRegistryTest, ALayoutIsConfirmedOnceAndForLaterAttempts) {
  JobRegistry registry(4);
  EXPECT_FALSE(
      (*Register(registry, MakeRegistration("vlm", "a")))->layout_confirmed);
  const auto wrong = registry.ConfirmLayout("vlm", 1, "other");
  EXPECT_EQ(wrong.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(wrong.message()), HasSubstr("layout_digest"));
  EXPECT_TRUE(registry.ConfirmLayout("vlm", 1, "layout").ok());
  EXPECT_TRUE(registry.ConfirmLayout("vlm", 1, "layout").ok());
  EXPECT_TRUE((*registry.Find("vlm"))->layout_confirmed);
  EXPECT_TRUE(
      (*Register(registry, MakeRegistration("vlm", "a")))->layout_confirmed);
  EXPECT_TRUE(
      (*Register(registry, MakeRegistration("vlm", "b")))->layout_confirmed);
}

TEST(JobRegistryTest, APinnedLayoutReplacesTheOldOneAndNeedsNoConfirmation) {
  JobRegistry registry(4);
  Register(registry, MakeRegistration("vlm", "a")).value();
  Registration pinned = MakeRegistration("vlm", "b");
  pinned.pinned.emplace();
  pinned.pinned_digest = "moved";
  const auto job = Register(registry, pinned, "moved");
  ASSERT_TRUE(job.ok());
  EXPECT_EQ((*job)->attempt, 2);
  EXPECT_EQ((*job)->layout_digest, "moved");
  EXPECT_TRUE((*job)->layout_confirmed);
}

TEST(JobRegistryTest, OldAttemptsAreAbortedAndUnknownOnesNotFound) {
  JobRegistry registry(4);
  Register(registry, MakeRegistration("vlm", "a")).value();
  Register(registry, MakeRegistration("vlm", "b")).value();
  EXPECT_EQ(registry.FindAttempt("vlm", 1).status().code(),
            absl::StatusCode::kAborted);
  EXPECT_TRUE(registry.FindAttempt("vlm", 2).ok());
  EXPECT_EQ(registry.FindAttempt("vlm", 3).status().code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(registry.ConfirmLayout("vlm", 1, "layout").code(),
            absl::StatusCode::kAborted);
}

TEST(JobRegistryTest, TellsWhatWasNotUsed) {
  const auto At = [](int64_t ms) {
    return Clock::TimePoint(std::chrono::milliseconds(ms));
  };
  JobRegistry registry(4);
  EXPECT_EQ(registry.LeastUsed(), std::nullopt);
  for (const char* name : {"a", "b", "c"}) {
    Register(registry, MakeRegistration(name, "start")).value();
    registry.NoteUsed(name, At(10));
  }
  registry.NoteUsed("b", At(30));
  registry.NoteUsed("gone", At(0));
  EXPECT_EQ(registry.LeastUsed(), At(10));
  EXPECT_THAT(registry.Unused(At(9)), IsEmpty());
  EXPECT_THAT(registry.Unused(At(29)), ElementsAre("a", "c"));
  EXPECT_THAT(registry.Unused(At(30)), ElementsAre("a", "b", "c"));
}

TEST(JobRegistryTest, KeepsMeanOfReportsAndCountsOfPlans) {
  JobRegistry registry(4);
  Register(registry, MakeRegistration("vlm", "a")).value();
  registry.CountReport("vlm", 1.0);
  registry.CountReport("vlm", 1.5);
  registry.CountPlan("vlm", PlanOrigin::kSafe);
  registry.CountPlan("gone", PlanOrigin::kSafe);
  const JobStats stats = *registry.Stats("vlm");
  EXPECT_EQ(stats.reports, 2);
  EXPECT_DOUBLE_EQ(stats.measured_over_predicted, 1.25);
  EXPECT_EQ(stats.plans_by_origin[static_cast<int>(PlanOrigin::kSafe)], 1);
}

}  // namespace
}  // namespace pipeweaver::server
