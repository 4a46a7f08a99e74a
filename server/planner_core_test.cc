#include "server/planner_core.h"

#include <atomic>
#include <future>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/testing/fake_clock.h"
#include "server/testing/puppet_planner.h"
#include "server/testing/text_codec.h"

namespace pipeweaver::server {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

CancelFlag NotCancelled() { return std::make_shared<std::atomic<bool>>(false); }

// Notes how long each sealed plan had waited for a thread; -1: for none.
class QueueObserver final : public PlannerObserver {
 public:
  void OnPlanSealed(const SealedPlan&, const PlanTimings& timings) override {
    MutexLock lock(&mutex_);
    queue_ns_.push_back(timings.queue_ns.value_or(-1));
  }
  // Of the first `count` plans, once they are sealed.
  std::vector<int64_t> QueueNs(size_t count) {
    while (true) {
      MutexLock lock(&mutex_);
      if (queue_ns_.size() >= count) return queue_ns_;
    }
  }

 private:
  Mutex mutex_;
  std::vector<int64_t> queue_ns_ ABSL_GUARDED_BY(mutex_);
};

class PlannerCoreTest : public ::testing::Test {
 protected:
  static PlannerCoreOptions Options() {
    PlannerCoreOptions options;
    options.planner_threads = 1;
    options.max_queued = 8;
    return options;
  }

  PlannerCoreTest()
      : core_(Options(), &planner_, &codec_, &clock_, &observer_) {}

  absl::StatusOr<std::shared_ptr<const RegisteredJob>> TryRegister(
      const std::string& name, const std::string& request_id,
      const std::string& digest = "digest", int replicas = 2) {
    Registration registration;
    registration.request_id = request_id;
    registration.job.name = name;
    registration.job.parallelism.pipeline_parallel = 2;
    registration.job.parallelism.data_parallel = replicas;
    registration.job_digest = digest;
    std::promise<absl::StatusOr<std::shared_ptr<const RegisteredJob>>> answer;
    core_.RegisterJob(registration, NotCancelled(), [&answer](auto job) {
      answer.set_value(std::move(job));
    });
    return answer.get_future().get();
  }

  // Registers and confirms.
  uint64_t Register(const std::string& name, const std::string& request_id) {
    const auto job = TryRegister(name, request_id).value();
    EXPECT_TRUE(
        core_.ConfirmLayout(name, job->attempt, job->layout_digest).ok());
    return job->attempt;
  }

  absl::Status Submit(const StepKey& key, int64_t label,
                      std::optional<Clock::Duration> needed_in = {},
                      int64_t budget_evaluations = 0,
                      std::optional<Clock::Duration> joint_wait = {}) {
    StepSubmission submission;
    submission.key = key;
    auto job = core_.registry().FindAttempt(key.job, key.attempt);
    if (!job.ok()) return job.status();
    submission.job = *job;
    submission.layout_digest = (*job)->layout_digest;
    submission.batch = LabelledBatch(label);
    submission.batch_digest = "batch " + std::to_string(label);
    submission.needed_in = needed_in;
    submission.budget_evaluations = budget_evaluations;
    submission.joint_wait = joint_wait;
    return core_.SubmitStep(submission);
  }

  StepResult Read(const StepKey& key) {
    std::promise<StepResult> answer;
    core_.ReadStep(key,
                   [&answer](StepResult r) { answer.set_value(std::move(r)); });
    return answer.get_future().get();
  }

  FakeClock clock_;
  PuppetPlanner planner_;
  TextCodec codec_;
  QueueObserver observer_;
  PlannerCore core_;
};

TEST_F(PlannerCoreTest, PlansAStepAndSealsWhatTheSearchFound) {
  Register("vlm", "a");
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 7).ok());
  const StepResult plan = Read({"vlm", 1, 0, 0});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ((*plan)->identity.origin, PlanOrigin::kSearchFinished);
  EXPECT_EQ((*plan)->plan->report.makespan_ns, 7);
  EXPECT_EQ(core_.registry().Stats("vlm")->plans_by_origin[1], 1);
  EXPECT_EQ(*Read({"vlm", 1, 0, 0}), *plan);
}

TEST_F(PlannerCoreTest, AReplacedPlanIsFreedAWhileLater) {
  Register("vlm", "a");
  std::weak_ptr<const SealedPlan> oldest;
  // As many as are held, and one more, which takes the place of the oldest.
  constexpr uint64_t kHeld = 8;
  for (uint64_t step = 0; step <= kHeld; ++step) {
    ASSERT_TRUE(Submit({"vlm", 1, step, 0}, static_cast<int64_t>(step)).ok());
    const StepResult plan = Read({"vlm", 1, step, 0});
    ASSERT_TRUE(plan.ok()) << plan.status();
    if (step == 0) oldest = *plan;
    core_.NoteFetched({"vlm", 1, step, 0}, 0);
    core_.NoteFetched({"vlm", 1, step, 0}, 1);
  }
  EXPECT_EQ(Read({"vlm", 1, 0, 0}).status().code(),
            absl::StatusCode::kNotFound);
  // The one thread for plans is through with the step when it takes another.
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 0).ok());
  ASSERT_TRUE(Read({"vlm", 1, 0, 1}).ok());
  EXPECT_FALSE(oldest.expired());
  clock_.Advance(milliseconds(20));
  for (int i = 0; i < 5000 && !oldest.expired(); ++i) {
    std::this_thread::sleep_for(milliseconds(1));
  }
  EXPECT_TRUE(oldest.expired());
}

TEST_F(PlannerCoreTest, ReplicasThatWaitForEachOtherArePlannedTogether) {
  Register("vlm", "a");
  const auto wait = std::chrono::seconds(1);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 8, {}, 0, wait).ok());
  // Another step does not wait, and comes first though it was submitted later.
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 9).ok());
  ASSERT_TRUE(Read({"vlm", 1, 1, 0}).ok());
  EXPECT_EQ(planner_.calls().size(), 1);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 7, {}, 0, wait).ok());
  for (const uint32_t replica : {0, 1}) {
    const StepResult plan = Read({"vlm", 1, 0, replica});
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ((*plan)->plan->report.makespan_ns, 7 + replica);
    EXPECT_EQ((*plan)->identity.joint_batch_digests, "batch 7batch 8");
  }
}

TEST_F(PlannerCoreTest, AJointSearchEndsWhenNobodyWantsItAnyMore) {
  Register("vlm", "a");
  Register("t2v", "a");
  planner_.HoldPlans();
  const auto wait = std::chrono::seconds(1);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 7, {}, 1'000'000, wait).ok());
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 8, {}, 1'000'000, wait).ok());
  planner_.WaitForPlans(1);
  ASSERT_TRUE(core_.CancelStep({"vlm", 1, 0, 0}).ok());
  ASSERT_TRUE(core_.CancelStep({"vlm", 1, 0, 1}).ok());
  // The held thread is free for others, and the other replica is not planned.
  ASSERT_TRUE(Submit({"t2v", 1, 0, 0}, 9).ok());
  planner_.WaitForPlans(2);
  EXPECT_EQ(planner_.calls()[1].label, 9);
  planner_.Finish(9);
  EXPECT_TRUE(Read({"t2v", 1, 0, 0}).ok());
}

TEST_F(PlannerCoreTest, StepsThatWaitForOthersLeaveHalfTheQueue) {
  Register("vlm", "a");
  Register("t2v", "a");
  const auto wait = std::chrono::seconds(1);
  for (uint64_t step = 0; step < 3; ++step) {
    ASSERT_TRUE(Submit({"vlm", 1, step, 0}, 7, {}, 0, wait).ok());
  }
  ASSERT_TRUE(Submit({"t2v", 1, 0, 0}, 7, {}, 0, wait).ok());
  const absl::Status full = Submit({"t2v", 1, 1, 0}, 7, {}, 0, wait);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()),
              HasSubstr("queue: half full, of 8 places (max_queued)"));
  EXPECT_TRUE(Submit({"t2v", 1, 1, 0}, 7).ok());
}

TEST_F(PlannerCoreTest, JointPlansNameTheCostsThatTheyWereMadeWith) {
  Register("vlm", "a");
  const auto wait = std::chrono::seconds(1);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 7, {}, 0, wait).ok());
  const std::string before = (*core_.registry().Find("vlm"))->profile_digest;
  semu::MeasuredLayer layer;
  layer.shape.items = layer.shape.tokens = 1;
  layer.ns = 1000;
  layer.count = 1;
  ASSERT_TRUE(core_.AddMeasuredLayers("vlm", {layer}).ok());
  while ((*core_.registry().Find("vlm"))->profile_digest == before) {
  }
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 8, {}, 0, wait).ok());
  for (const uint32_t replica : {0, 1}) {
    const StepResult plan = Read({"vlm", 1, 0, replica});
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ((*plan)->identity.profile_digest, before);
    EXPECT_EQ((*plan)->costs->number, 0);
  }
}

TEST_F(PlannerCoreTest, ReplicasThatWaitForEachOtherWaitForNoThread) {
  Register("vlm", "a");
  constexpr auto kWait = std::chrono::seconds(60);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1, {}, 0, kWait).ok());
  clock_.Advance(std::chrono::seconds(1));
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 2, {}, 0, kWait).ok());
  ASSERT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  ASSERT_TRUE(Read({"vlm", 1, 0, 1}).ok());
  EXPECT_THAT(observer_.QueueNs(2), ElementsAre(0, 0));
}

TEST_F(PlannerCoreTest, WaitsForReplicasEndAtADrain) {
  Register("vlm", "a");
  constexpr auto kWait = std::chrono::seconds(60);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1, {}, 0, kWait).ok());
  core_.EndJointWaits();
  EXPECT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  // One that came in meanwhile waits for none.
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 1, {}, 0, kWait).ok());
  EXPECT_TRUE(Read({"vlm", 1, 1, 0}).ok());
}

TEST_F(PlannerCoreTest, JointPlansTellHowLongSealingTakes) {
  Register("vlm", "a");
  planner_.set_lower_ns(3'000'000);
  const auto wait = std::chrono::seconds(1);
  for (const uint32_t replica : {0, 1}) {
    ASSERT_TRUE(Submit({"vlm", 1, 0, replica}, 7, {}, 0, wait).ok());
  }
  for (const uint32_t replica : {0, 1}) {
    ASSERT_TRUE(Read({"vlm", 1, 0, replica}).ok());
  }
  while (core_.registry().Stats("vlm")->seal_ns < 3'000'000) {
  }
}

TEST_F(PlannerCoreTest, AReplicaIsPlannedWhenItsWaitIsOver) {
  Register("vlm", "a");
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 8, {}, 0, std::chrono::seconds(1)).ok());
  clock_.Advance(std::chrono::seconds(1));
  const StepResult plan = Read({"vlm", 1, 0, 1});
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ((*plan)->identity.joint_batch_digests, "batch 8");
}

TEST_F(PlannerCoreTest, WaitingReplicasAreWithdrawnAndHoldNoPlaces) {
  Register("vlm", "a");
  const auto wait = std::chrono::seconds(1);
  // More than the queue holds, were places kept.
  size_t planned = 0;
  for (uint64_t step = 0; step < 20; ++step) {
    ASSERT_TRUE(Submit({"vlm", 1, step, 1}, 7, {}, 0, wait).ok()) << step;
    ASSERT_TRUE(core_.CancelStep({"vlm", 1, step, 1}).ok());
    ASSERT_TRUE(Submit({"vlm", 1, step, 1}, 8, {}, 0, wait).ok()) << step;
    EXPECT_EQ(planner_.calls().size(), planned);
    clock_.Advance(wait);
    const StepResult plan = Read({"vlm", 1, step, 1});
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ((*plan)->identity.joint_batch_digests, "batch 8");
    planned = planner_.calls().size();
    core_.NoteFetched({"vlm", 1, step, 1}, 0);
    core_.NoteFetched({"vlm", 1, step, 1}, 1);
  }
}

TEST_F(PlannerCoreTest, JointStepsThatEndBeforeTheirTimeHoldNothing) {
  Register("vlm", "a");
  const auto wait = std::chrono::minutes(10);
  // Each more often than the queue has places.
  for (uint64_t step = 0; step < 20; ++step) {
    ASSERT_TRUE(Submit({"vlm", 1, step, 1}, 7, {}, 0, wait).ok()) << step;
    ASSERT_TRUE(core_.CancelStep({"vlm", 1, step, 1}).ok());
  }
  for (uint64_t step = 20; step < 40; ++step) {
    ASSERT_TRUE(Submit({"vlm", 1, step, 1}, 7, milliseconds(30), 0, wait).ok())
        << step;
    clock_.Advance(milliseconds(28));
    EXPECT_EQ((*Read({"vlm", 1, step, 1}))->identity.origin, PlanOrigin::kSafe);
  }
  for (int attempt = 2; attempt < 22; ++attempt) {
    Register("vlm", absl::StrCat("run ", attempt));
    ASSERT_TRUE(
        Submit({"vlm", static_cast<uint64_t>(attempt), 0, 1}, 7, {}, 0, wait)
            .ok())
        << attempt;
  }
  EXPECT_TRUE(planner_.calls().empty());
}

TEST_F(PlannerCoreTest, AWithdrawnStepStartsNoWait) {
  Register("vlm", "a");
  const auto wait = std::chrono::seconds(1);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 7, {}, 0, wait).ok());
  ASSERT_TRUE(core_.CancelStep({"vlm", 1, 0, 1}).ok());
  clock_.Advance(milliseconds(900));
  ASSERT_TRUE(Submit({"vlm", 1, 0, 1}, 8, {}, 0, wait).ok());
  clock_.Advance(milliseconds(900));
  // The other replica comes in time.
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 9, {}, 0, wait).ok());
  EXPECT_EQ((*Read({"vlm", 1, 0, 1}))->identity.joint_batch_digests,
            "batch 9batch 8");
}

TEST_F(PlannerCoreTest, JointPlansNameTheBudgetOfTheirSearch) {
  Register("vlm", "a");
  const auto wait = std::chrono::seconds(1);
  for (const uint32_t replica : {0, 1}) {
    ASSERT_TRUE(
        Submit({"vlm", 1, 0, replica}, 7, {}, 100 + replica, wait).ok());
    ASSERT_TRUE(
        Submit({"vlm", 1, 1, replica}, 8, {}, 100 * replica, wait).ok());
  }
  for (const uint32_t replica : {0, 1}) {
    EXPECT_EQ((*Read({"vlm", 1, 0, replica}))->identity.budget_evaluations,
              201);
    // A replica without one: time bounds the search of all.
    EXPECT_EQ((*Read({"vlm", 1, 1, replica}))->identity.budget_evaluations, 0);
  }
}

// Two replicas of two microbatches, in one module of one layer.
class MovesTest : public PlannerCoreTest {
 protected:
  void SetUp() override {
    Registration registration;
    registration.request_id = "a";
    registration.job.name = "vlm";
    registration.job.parallelism.pipeline_parallel = 2;
    registration.job.parallelism.data_parallel = 2;
    semu::Module& module = registration.job.modules.emplace_back();
    module.layers.emplace_back().count = 1;
    registration.job_digest = "digest";
    std::promise<void> ready;
    core_.RegisterJob(registration, NotCancelled(), [&](const auto& job) {
      ASSERT_TRUE(job.ok()) << job.status();
      ASSERT_TRUE(core_.ConfirmLayout("vlm", 1, (*job)->layout_digest).ok());
      ready.set_value();
    });
    ready.get_future().wait();
  }

  // Replica 0 has microbatches of 100 and 90 tokens, replica 1 of 10 and 20;
  // evened out, replica 0 has the 100 and the 10.
  StepSubmission Submission(uint32_t replica) {
    StepSubmission submission;
    submission.key = {"vlm", 1, 0, replica};
    submission.job = *core_.registry().Find("vlm");
    submission.layout_digest = submission.job->layout_digest;
    submission.batch = LabelledBatch(replica == 0 ? 100 : 10);
    submission.batch.microbatches.push_back(
        LabelledBatch(replica == 0 ? 90 : 20).microbatches[0]);
    submission.batch_digest = absl::StrCat("batch ", replica);
    submission.joint_wait = std::chrono::seconds(1);
    submission.move_microbatches = true;
    return submission;
  }
  std::shared_ptr<const SealedPlan> Plan(uint32_t replica) {
    const StepResult plan = Read({"vlm", 1, 0, replica});
    EXPECT_TRUE(plan.ok()) << plan.status();
    return *plan;
  }
  // Each replica's plan is of its own batch.
  void ExpectNothingMoved() {
    EXPECT_FALSE(Plan(0)->moved);
    EXPECT_EQ(Plan(0)->plan->report.makespan_ns, 100);
    EXPECT_FALSE(Plan(1)->moved);
    EXPECT_EQ(Plan(1)->plan->report.makespan_ns, 10);
  }
};

TEST_F(MovesTest, MicrobatchesAreDealtOutWhenAllReplicasArrived) {
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  ASSERT_TRUE(core_.SubmitStep(Submission(0)).ok());
  EXPECT_TRUE(Plan(0)->moved);
  EXPECT_TRUE(Plan(1)->moved);
  EXPECT_THAT(Plan(0)->plan_bytes, HasSubstr(" from 0/0 from 1/0"));
  EXPECT_THAT(Plan(1)->plan_bytes, HasSubstr(" from 0/1 from 1/1"));
  EXPECT_EQ(Plan(1)->plan->report.makespan_ns, 90);
  // The identity names what was submitted.
  EXPECT_EQ(Plan(1)->identity.batch_digest, "batch 1");
  EXPECT_EQ(Plan(1)->identity.joint_batch_digests, "batch 0batch 1");
  EXPECT_EQ(core_.registry().Stats("vlm")->plans_by_origin[1], 2);
}

TEST_F(MovesTest, NothingMovesWhenAReplicaComesLate) {
  ASSERT_TRUE(core_.SubmitStep(Submission(0)).ok());
  clock_.Advance(std::chrono::seconds(1));
  EXPECT_EQ(Plan(0)->identity.joint_batch_digests, "batch 0");
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  clock_.Advance(std::chrono::seconds(1));
  ExpectNothingMoved();
}

TEST_F(MovesTest, NothingMovesUnlessAllReplicasAskForIt) {
  StepSubmission other = Submission(0);
  other.move_microbatches = false;
  ASSERT_TRUE(core_.SubmitStep(other).ok());
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  ExpectNothingMoved();
  EXPECT_EQ(Plan(1)->identity.joint_batch_digests, "batch 0batch 1");
}

TEST_F(MovesTest, NothingMovesBetweenStepsThatRunAndShadows) {
  StepSubmission other = Submission(0);
  other.shadow = true;
  ASSERT_TRUE(core_.SubmitStep(other).ok());
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  ExpectNothingMoved();
}

TEST_F(MovesTest, NothingMovesBetweenTrainingAndValidation) {
  StepSubmission other = Submission(0);
  other.batch.forward_only = true;
  ASSERT_TRUE(core_.SubmitStep(other).ok());
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  ExpectNothingMoved();
}

TEST_F(MovesTest, NothingMovesWhenOneReplicaHasNoPlan) {
  planner_.HoldPlans();
  ASSERT_TRUE(core_.SubmitStep(Submission(0)).ok());
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  planner_.Finish(100);
  planner_.Fail(90, absl::InternalError("no plan"));
  ExpectNothingMoved();
  EXPECT_EQ(Plan(0)->identity.origin, PlanOrigin::kSafe);
  EXPECT_EQ(Plan(1)->identity.origin, PlanOrigin::kSafe);
}

TEST_F(MovesTest, NothingMovesWhenAReplicaIsSealedDuringTheSearch) {
  planner_.HoldPlans();
  StepSubmission hurried = Submission(0);
  hurried.needed_in = milliseconds(500);
  ASSERT_TRUE(core_.SubmitStep(hurried).ok());
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  planner_.WaitForPlans(1);
  clock_.Advance(milliseconds(500));
  EXPECT_EQ(Plan(0)->identity.origin, PlanOrigin::kSafe);
  planner_.Finish(100);
  planner_.Finish(90);
  ExpectNothingMoved();
}

TEST_F(MovesTest, NothingMovesWhenAReplicaIsWithdrawnDuringTheSearch) {
  planner_.HoldPlans();
  ASSERT_TRUE(core_.SubmitStep(Submission(0)).ok());
  ASSERT_TRUE(core_.SubmitStep(Submission(1)).ok());
  planner_.WaitForPlans(1);
  ASSERT_TRUE(core_.CancelStep({"vlm", 1, 0, 0}).ok());
  planner_.Finish(100);
  planner_.Finish(90);
  EXPECT_FALSE(Plan(1)->moved);
  EXPECT_EQ(Plan(1)->plan->report.makespan_ns, 10);
}

TEST_F(PlannerCoreTest, StepsNeedAConfirmedLayout) {
  const auto job = TryRegister("vlm", "a").value();
  const auto early = Submit({"vlm", 1, 0, 0}, 7);
  EXPECT_EQ(early.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(early.message()), HasSubstr("not confirmed"));
  ASSERT_TRUE(core_.ConfirmLayout("vlm", 1, job->layout_digest).ok());
  StepSubmission submission;
  submission.key = {"vlm", 1, 0, 0};
  submission.job = *core_.registry().Find("vlm");
  submission.layout_digest = "other";
  const auto other = core_.SubmitStep(submission);
  EXPECT_EQ(other.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(other.message()), HasSubstr("layout_digest"));
}

TEST_F(PlannerCoreTest, NothingStaysBehindWhenAJobCannotBePrepared) {
  planner_.FailPrepare(absl::ResourceExhaustedError("rank 1 does not fit"));
  EXPECT_EQ(TryRegister("vlm", "a").status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(core_.registry().Names().empty());
  planner_.FailPrepare(absl::OkStatus());
  EXPECT_EQ(TryRegister("vlm", "a", "another digest").value()->attempt, 1);
}

TEST_F(PlannerCoreTest, StepsAreNotHeldUpByRegistrationsThatEndWhenCancelled) {
  Register("vlm", "a");
  planner_.HoldPrepares();
  const CancelFlag cancelled = NotCancelled();
  // More than there are threads.
  constexpr int kRegistrations = 5;
  std::promise<absl::Status> answers[kRegistrations];
  for (int i = 0; i < kRegistrations; ++i) {
    Registration registration;
    registration.job.name = "t2v-" + std::to_string(i);
    core_.RegisterJob(registration, cancelled, [&answers, i](const auto& job) {
      answers[i].set_value(job.status());
    });
  }
  planner_.WaitForPrepares(1);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 7).ok());
  EXPECT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  cancelled->store(true);
  for (auto& answer : answers) {
    EXPECT_EQ(answer.get_future().get().code(), absl::StatusCode::kCancelled);
  }
  EXPECT_THAT(core_.registry().Names(), ElementsAre("vlm"));
}

TEST_F(PlannerCoreTest, ARegistrationEndsWhenTheServerStops) {
  planner_.HoldPrepares();
  std::promise<absl::Status> answer;
  Registration registration;
  registration.job.name = "vlm";
  core_.RegisterJob(registration, NotCancelled(), [&answer](const auto& job) {
    answer.set_value(job.status());
  });
  planner_.WaitForPrepares(1);
  core_.Stop();
  EXPECT_EQ(answer.get_future().get().code(), absl::StatusCode::kUnavailable);
}

TEST_F(PlannerCoreTest, APinnedLayoutWaitsForNoOtherAndFewLayoutsAreLookedFor) {
  planner_.HoldPrepares();
  const CancelFlag cancelled = NotCancelled();
  // One has the thread, sixteen wait.
  constexpr int kRegistrations = 18;
  std::promise<absl::Status> answers[kRegistrations];
  const auto try_register = [&](int i, bool pinned) {
    Registration registration;
    registration.job.name = "t2v-" + std::to_string(i);
    registration.job.parallelism.pipeline_parallel = 2;
    if (pinned) registration.pinned = semu::Layout();
    core_.RegisterJob(registration, cancelled, [&answers, i](const auto& job) {
      answers[i].set_value(job.status());
    });
  };
  try_register(0, /*pinned=*/false);
  planner_.WaitForPrepares(1);
  for (int i = 1; i < kRegistrations; ++i) try_register(i, /*pinned=*/false);
  const absl::Status full = answers[kRegistrations - 1].get_future().get();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("16 registrations"));
  EXPECT_EQ(core_.registrations().queued, 16);
  answers[kRegistrations - 1] = std::promise<absl::Status>();
  try_register(kRegistrations - 1, /*pinned=*/true);
  planner_.WaitForPrepares(2);
  cancelled->store(true);
  for (auto& answer : answers) {
    EXPECT_EQ(answer.get_future().get().code(), absl::StatusCode::kCancelled);
  }
}

TEST_F(PlannerCoreTest, TheSearchEndsByBudgetOrBeforeThePlanIsNeeded) {
  Register("vlm", "a");
  planner_.set_lower_ns(1'000'000);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 4, milliseconds(30)).ok());
  ASSERT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 1).ok());
  ASSERT_TRUE(Read({"vlm", 1, 1, 0}).ok());
  ASSERT_TRUE(Submit({"vlm", 1, 2, 0}, 2, milliseconds(30)).ok());
  ASSERT_TRUE(Read({"vlm", 1, 2, 0}).ok());
  ASSERT_TRUE(Submit({"vlm", 1, 3, 0}, 3, {}, 100).ok());
  ASSERT_TRUE(Read({"vlm", 1, 3, 0}).ok());
  const auto calls = planner_.calls();
  const auto Deadline = [&](int i) {
    return *calls[i].options.search.budget.deadline - clock_.Now();
  };
  EXPECT_EQ(Deadline(0), milliseconds(21)) << "a quarter of 28 for sealing";
  EXPECT_EQ(Deadline(1), milliseconds(50));
  EXPECT_EQ(Deadline(2), milliseconds(27)) << "1 for sealing, as before";
  EXPECT_EQ(Deadline(3), std::chrono::seconds(10));
  EXPECT_EQ(calls[3].options.search.budget.evaluations, 100);
}

TEST_F(PlannerCoreTest, AnUnfinishedSearchCutByNeedSaysSo) {
  Register("vlm", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1, milliseconds(30)).ok());
  planner_.Finish(1, /*finished=*/false);
  EXPECT_EQ((*Read({"vlm", 1, 0, 0}))->identity.origin, PlanOrigin::kSearchCut);
  // Its own time budget spent: that is an end, not a cut.
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 2, milliseconds(900)).ok());
  planner_.Finish(2, /*finished=*/false);
  EXPECT_EQ((*Read({"vlm", 1, 1, 0}))->identity.origin,
            PlanOrigin::kSearchFinished);
}

TEST_F(PlannerCoreTest, AnOverdueSearchIsReplacedByTheSafeProgram) {
  Register("vlm", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1, milliseconds(30)).ok());
  planner_.WaitForPlans(1);
  clock_.Advance(milliseconds(28));
  const StepResult plan = Read({"vlm", 1, 0, 0});
  EXPECT_EQ((*plan)->identity.origin, PlanOrigin::kSafe);
  EXPECT_THAT(observer_.QueueNs(1), ElementsAre(-1));
  EXPECT_EQ(planner_.safe_calls(), 1);
  planner_.Finish(1);
  EXPECT_EQ(*Read({"vlm", 1, 0, 0}), *plan);
}

TEST_F(PlannerCoreTest, AQueuedSearchIsReplacedToo) {
  Register("vlm", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  planner_.WaitForPlans(1);
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 2, milliseconds(30)).ok());
  EXPECT_EQ(core_.load().queued, 1);
  clock_.Advance(milliseconds(28));
  EXPECT_EQ((*Read({"vlm", 1, 1, 0}))->identity.origin, PlanOrigin::kSafe);
  planner_.Finish(1);
  EXPECT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  EXPECT_EQ(planner_.calls().size(), 1);
}

TEST_F(PlannerCoreTest, APlanOfALikeBatchComesBeforeTheSafeProgram) {
  Register("vlm", "a");
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  const StepResult first = Read({"vlm", 1, 0, 0});
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 2, 0}, 1, milliseconds(30)).ok());
  planner_.WaitForPlans(2);
  clock_.Advance(milliseconds(28));
  const StepResult cached = Read({"vlm", 1, 2, 0});
  EXPECT_EQ((*cached)->identity.origin, PlanOrigin::kCached);
  EXPECT_EQ((*cached)->identity.warm_start_digest, (*first)->plan_digest);
  EXPECT_EQ((*cached)->plan, (*first)->plan);
  EXPECT_EQ(planner_.safe_calls(), 0);
}

TEST_F(PlannerCoreTest, ASearchStartsFromThePlanBeforeAndNamesIt) {
  Register("vlm", "a");
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  const StepResult first = Read({"vlm", 1, 0, 0});
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 2).ok());
  EXPECT_EQ((*Read({"vlm", 1, 1, 0}))->identity.warm_start_digest,
            (*first)->plan_digest);
  // With a budget of evaluations the plan depends on the request alone.
  ASSERT_TRUE(Submit({"vlm", 1, 2, 0}, 3, {}, 100).ok());
  EXPECT_EQ((*Read({"vlm", 1, 2, 0}))->identity.warm_start_digest, "");
  const auto calls = planner_.calls();
  EXPECT_FALSE(calls[0].warm);
  EXPECT_TRUE(calls[1].warm);
  EXPECT_FALSE(calls[2].warm);
}

TEST_F(PlannerCoreTest, AFailedSearchFallsBackAndKeepsItsReason) {
  Register("vlm", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  planner_.Fail(1, absl::ResourceExhaustedError("rank 0 is full"));
  EXPECT_EQ((*Read({"vlm", 1, 0, 0}))->identity.origin, PlanOrigin::kSafe);
  planner_.FailSafe(absl::ResourceExhaustedError("safe does not fit either"));
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 2).ok());
  planner_.Fail(2, absl::ResourceExhaustedError("rank 0 is full"));
  const auto failed = Read({"vlm", 1, 1, 0}).status();
  EXPECT_EQ(failed.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(failed.message()), HasSubstr("rank 0 is full"));
  EXPECT_EQ(Read({"vlm", 1, 1, 0}).status(), failed);
}

TEST_F(PlannerCoreTest, CancellationFreesRunningAndQueuedSearches) {
  Register("vlm", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  ASSERT_TRUE(Submit({"vlm", 1, 1, 0}, 2).ok());
  planner_.WaitForPlans(1);
  EXPECT_TRUE(core_.CancelStep({"vlm", 1, 1, 0}).ok());
  EXPECT_EQ(core_.load().queued, 0);
  EXPECT_TRUE(core_.CancelStep({"vlm", 1, 0, 0}).ok());
  ASSERT_TRUE(Submit({"vlm", 1, 2, 0}, 3).ok());
  planner_.WaitForPlans(2);  // the held search made way
  EXPECT_TRUE(core_.RemoveJob("vlm").ok());
  EXPECT_EQ(core_.held().steps, 0);
  EXPECT_EQ(core_.RemoveJob("vlm").code(), absl::StatusCode::kNotFound);
}

TEST_F(PlannerCoreTest, ANewAttemptEndsSearchesOfTheOldOne) {
  Register("vlm", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  planner_.WaitForPlans(1);
  std::promise<StepResult> waiting;
  core_.ReadStep({"vlm", 1, 0, 0}, [&waiting](StepResult result) {
    waiting.set_value(std::move(result));
  });
  EXPECT_EQ(Register("vlm", "b"), 2);
  EXPECT_EQ(waiting.get_future().get().status().code(),
            absl::StatusCode::kAborted);
  EXPECT_EQ(Submit({"vlm", 1, 1, 0}, 1).code(), absl::StatusCode::kAborted);
  ASSERT_TRUE(Submit({"vlm", 2, 0, 0}, 5).ok());
  planner_.Finish(5);
  EXPECT_TRUE(Read({"vlm", 2, 0, 0}).ok());
}

class CostsObserver final : public PlannerObserver {
 public:
  void OnCosts(const std::string&, const CostVersion&, bool is_new) override {
    ++(is_new ? new_versions : old_versions);
  }
  std::atomic<int> new_versions = 0, old_versions = 0;
};

TEST(PlannerCoreObserverTest, ARepeatedRegistrationIsNotObserved) {
  FakeClock clock;
  PuppetPlanner planner;
  TextCodec codec;
  CostsObserver observer;
  PlannerCore core(PlannerCoreOptions(), &planner, &codec, &clock, &observer);
  Registration registration;
  registration.job.name = "vlm";
  registration.job.parallelism.pipeline_parallel = 2;
  registration.job_digest = "digest";
  const auto run = [&](const std::string& request_id) {
    registration.request_id = request_id;
    std::promise<void> done;
    core.RegisterJob(registration, NotCancelled(), [&](const auto& job) {
      EXPECT_TRUE(job.ok()) << job.status();
      done.set_value();
    });
    done.get_future().wait();
  };
  run("a");
  run("a");
  EXPECT_EQ(observer.old_versions, 1);
  run("b");
  EXPECT_EQ(observer.old_versions, 2);
  EXPECT_EQ(observer.new_versions, 0);
}

// A job whose costs are learnt while it is laid out anew.
class PlannerCoreCostsTest : public ::testing::Test {
 protected:
  static PlannerCoreOptions Options() {
    PlannerCoreOptions options;
    options.planner_threads = 2;
    return options;
  }

  PlannerCoreCostsTest()
      : core_(Options(), &planner_, &codec_, &clock_, nullptr) {}

  // Begins to register the job on a layout, which `tokens` tells from others.
  std::future<uint64_t> Register(const std::string& request_id,
                                 int64_t tokens) {
    Registration registration;
    registration.request_id = request_id;
    registration.job.name = "vlm";
    registration.job.parallelism.pipeline_parallel = 2;
    registration.job.device.memory_bytes = int64_t{1} << 40;
    registration.job.modules.resize(1);
    registration.job_digest = "digest";
    semu::ModuleLayout layout;
    layout.sub_microbatch_tokens = tokens;
    layout.segments.resize(1);
    layout.segments[0].chunks = {{0, 0, 1}, {1, 1, 1}};
    registration.pinned.emplace().modules = {layout};
    registration.pinned_digest =
        codec_.LayoutDigest(registration.job, *registration.pinned);
    auto answer = std::make_shared<std::promise<uint64_t>>();
    core_.RegisterJob(registration, NotCancelled(), [answer](const auto& job) {
      EXPECT_TRUE(job.ok()) << job.status();
      answer->set_value(job.ok() ? (*job)->attempt : 0);
    });
    return answer->get_future();
  }

  void UploadLayer() {
    semu::MeasuredLayer layer;
    layer.shape.items = layer.shape.tokens = 1;
    layer.ns = 1000;
    layer.count = 1;
    ASSERT_TRUE(core_.AddMeasuredLayers("vlm", {layer}).ok());
  }

  // Plans a step and reports that rank 1 held so much.
  void ReportPeak(uint64_t attempt, int64_t bytes) {
    StepSubmission submission;
    submission.key = {"vlm", attempt, 0, 0};
    submission.job = *core_.registry().Find("vlm");
    submission.layout_digest = submission.job->layout_digest;
    submission.batch = LabelledBatch(7);
    ASSERT_TRUE(core_.SubmitStep(submission).ok());
    std::promise<StepResult> plan;
    core_.ReadStep(submission.key, [&plan](StepResult result) {
      plan.set_value(std::move(result));
    });
    StepReportIn report;
    report.key = submission.key;
    report.plan_digest = (*plan.get_future().get())->plan_digest;
    report.rank = 1;
    report.step_ns = 7;
    report.peak_memory_bytes = bytes;
    ASSERT_TRUE(core_.ReportStep(report).ok());
  }

  std::shared_ptr<const CostVersion> AwaitVersion(int64_t number) {
    while (true) {
      const auto version = (*core_.registry().Find("vlm"))->cost_version;
      if (version->number >= number) return version;
      std::this_thread::yield();
    }
  }

  FakeClock clock_;
  PuppetPlanner planner_;
  TextCodec codec_;
  PlannerCore core_;
};

TEST_F(PlannerCoreCostsTest, ANewLayoutGetsCostsPublishedWhileItWasPrepared) {
  Register("a", 1).wait();
  planner_.HoldPrepares(1);
  auto relayout = Register("b", 2);
  planner_.WaitForPrepares(1);
  UploadLayer();
  EXPECT_EQ(AwaitVersion(1)->measured_layers, 1) << "the layout before";
  planner_.ReleasePrepare();
  EXPECT_EQ(relayout.get(), 2u);
  EXPECT_EQ(AwaitVersion(1)->measured_layers, 1);
  EXPECT_EQ((*core_.registry().Find("vlm"))->attempt, 2u);
}

TEST_F(PlannerCoreCostsTest, ANewLayoutGetsCostsPreparedForTheOneBefore) {
  Register("a", 1).wait();
  planner_.HoldPrepares(2);
  auto relayout = Register("b", 2);
  planner_.WaitForPrepares(1);
  UploadLayer();
  planner_.WaitForPrepares(2);
  planner_.ReleasePrepare();
  EXPECT_EQ(relayout.get(), 2u);
  EXPECT_EQ((*core_.registry().Find("vlm"))->cost_version->number, 0);
  planner_.ReleasePrepare();
  EXPECT_EQ(AwaitVersion(1)->measured_layers, 1);
  EXPECT_EQ((*core_.registry().Find("vlm"))->attempt, 2u);
}

TEST_F(PlannerCoreCostsTest, CostsThatFoundNoPlanAreTriedAgain) {
  const uint64_t attempt = Register("a", 1).get();
  planner_.FailPrepare(absl::ResourceExhaustedError("no plan"));
  UploadLayer();
  while ((*core_.registry().Find("vlm"))->costs->current()->number == 0) {
    std::this_thread::yield();
  }
  planner_.FailPrepare(absl::OkStatus());
  ReportPeak(attempt, 0);
  EXPECT_EQ(AwaitVersion(1)->measured_layers, 1);
}

// The reserve of the layout before is none that the new one has plans with.
TEST_F(PlannerCoreCostsTest, AReserveIsTakenBackOnANewLayoutToo) {
  constexpr int64_t kStep = JobCosts::kReserveStepBytes;
  ReportPeak(Register("a", 1).get(), 5 * kStep);
  EXPECT_THAT(AwaitVersion(1)->extra_reserve_bytes, ElementsAre(0, 5 * kStep));
  const uint64_t attempt = Register("b", 2).get();
  planner_.FailReserves();
  ReportPeak(attempt, 3 * kStep);
  EXPECT_THAT(AwaitVersion(3)->extra_reserve_bytes, ElementsAre(0, 0));
}

TEST_F(PlannerCoreTest, TheQueueIsBounded) {
  Register("vlm", "a");
  Register("t2v", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  planner_.WaitForPlans(1);
  for (int step = 1; step < 8; ++step) {
    ASSERT_TRUE(Submit({"vlm", 1, static_cast<uint64_t>(step), 0}, 1).ok());
  }
  ASSERT_TRUE(Submit({"t2v", 1, 0, 0}, 1).ok());
  const auto full = Submit({"t2v", 1, 1, 0}, 1);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("max_queued"));
  // What was refused left nothing behind.
  EXPECT_EQ(Read({"t2v", 1, 1, 0}).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_F(PlannerCoreTest, ReplicasOutOfRangeAreRefused) {
  Register("vlm", "a");
  const auto status = Read({"vlm", 1, 0, 2}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("key.replica: 2"));
}

TEST_F(PlannerCoreTest, ReportsAreCheckedAndCountedOnce) {
  Register("vlm", "a");
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 100).ok());
  const StepResult plan = Read({"vlm", 1, 0, 0});
  StepReportIn report{{"vlm", 1, 0, 0}, (*plan)->plan_digest, 0, 0, {}, 150};
  EXPECT_TRUE(core_.ReportStep(report).ok());
  EXPECT_TRUE(core_.ReportStep(report).ok());
  EXPECT_EQ(core_.registry().Stats("vlm")->reports, 1);
  EXPECT_DOUBLE_EQ(core_.registry().Stats("vlm")->measured_over_predicted, 1.5);
  StepReportIn bad = report;
  bad.plan_digest = "other";
  EXPECT_EQ(core_.ReportStep(bad).code(),
            absl::StatusCode::kFailedPrecondition);
  bad = report;
  bad.rank = 2;
  EXPECT_THAT(std::string(core_.ReportStep(bad).message()),
              HasSubstr("rank: 2"));
  bad = report;
  bad.num_start_offsets = 3;
  bad.duration_ns = {1, 2, 3};
  EXPECT_EQ(core_.ReportStep(bad).code(), absl::StatusCode::kInvalidArgument);
  bad = report;
  bad.num_start_offsets = 2;
  bad.duration_ns = {1, uint64_t{1} << 60};
  EXPECT_THAT(
      std::string(core_.ReportStep(bad).message()),
      HasSubstr("duration_ns[1]: 1152921504606846976, must be at most"));
  bad = report;
  bad.step_ns = 0;
  EXPECT_EQ(core_.ReportStep(bad).code(), absl::StatusCode::kInvalidArgument);
  bad.step_ns = uint64_t{1} << 63;
  EXPECT_EQ(core_.ReportStep(bad).code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PlannerCoreTest, ReportsTakeNoPlacesOfSteps) {
  Register("vlm", "a");
  std::vector<StepReportIn> reports;
  for (uint64_t step = 0; step < 4; ++step) {
    ASSERT_TRUE(Submit({"vlm", 1, step, 0}, 100).ok());
    const StepResult plan = Read({"vlm", 1, step, 0});
    for (const uint32_t rank : {0, 1}) {
      reports.push_back(
          {{"vlm", 1, step, 0}, (*plan)->plan_digest, rank, 0, {}, 150});
    }
  }
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 4, 0}, 7).ok());
  planner_.WaitForPlans(5);
  for (const StepReportIn& report : reports) {
    ASSERT_TRUE(core_.ReportStep(report).ok());
  }
  EXPECT_TRUE(Submit({"vlm", 1, 5, 0}, 7).ok());
}

TEST_F(PlannerCoreTest, ComparesStrategiesAndStartsWithItsOwn) {
  Register("vlm", "a");
  std::promise<absl::StatusOr<std::vector<StrategyOutcome>>> answer;
  core_.CompareStrategies(
      *core_.registry().Find("vlm"), LabelledBatch(9), {"1f1b", "megatron"}, 1,
      0, Clock::TimePoint::max(), NotCancelled(),
      [&answer](auto outcomes) { answer.set_value(std::move(outcomes)); });
  const auto outcomes = answer.get_future().get();
  ASSERT_TRUE(outcomes.ok());
  ASSERT_EQ(outcomes->size(), 3);
  EXPECT_EQ((*outcomes)[0].strategy, "planner");
  EXPECT_EQ((*outcomes)[0].report->strategy, "puppet");
  EXPECT_EQ((*outcomes)[2].strategy, "megatron");
  EXPECT_EQ((*outcomes)[2].report->makespan_ns, 9);
}

TEST_F(PlannerCoreTest, StepsDoNotWaitForQuestionsWhichCancellingEnds) {
  Register("vlm", "a");
  planner_.HoldPlans();
  const CancelFlag cancelled = NotCancelled();
  std::promise<absl::Status> answer;
  core_.CompareStrategies(
      *core_.registry().Find("vlm"), LabelledBatch(9), {"1f1b"}, 1, 0,
      Clock::TimePoint::max(), cancelled,
      [&answer](const auto& outcomes) { answer.set_value(outcomes.status()); });
  planner_.WaitForPlans(1);
  EXPECT_EQ(core_.questions().running, 1);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  planner_.WaitForPlans(2);
  planner_.Finish(1);
  EXPECT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  EXPECT_EQ(core_.questions().running, 1);
  cancelled->store(true);
  core_.DropCancelled();
  EXPECT_EQ(answer.get_future().get().code(), absl::StatusCode::kCancelled);
}

TEST_F(PlannerCoreTest, StopAnswersAllThatWait) {
  Register("vlm", "a");
  planner_.HoldPlans();
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  planner_.WaitForPlans(1);
  std::promise<StepResult> waiting;
  core_.ReadStep({"vlm", 1, 0, 0}, [&waiting](StepResult result) {
    waiting.set_value(std::move(result));
  });
  core_.Stop();
  EXPECT_EQ(waiting.get_future().get().status().code(),
            absl::StatusCode::kUnavailable);
  absl::Status answer;
  core_.RunQuestion("vlm", NotCancelled(),
                    [&answer](const absl::Status& status,
                              const std::atomic<bool>&) { answer = status; });
  EXPECT_EQ(answer.code(), absl::StatusCode::kUnavailable);
}

TEST_F(PlannerCoreTest, StopEndsQuestionsThatNobodyCancelled) {
  Register("vlm", "a");
  planner_.HoldPlans();
  const CancelFlag cancelled = NotCancelled();
  std::promise<absl::Status> compared;
  core_.CompareStrategies(*core_.registry().Find("vlm"), LabelledBatch(9), {},
                          1, 0, Clock::TimePoint::max(), cancelled,
                          [&compared](const auto& outcomes) {
                            compared.set_value(outcomes.status());
                          });
  planner_.WaitForPlans(1);
  core_.BeginStop();
  EXPECT_EQ(compared.get_future().get().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(cancelled->load());
}

TEST_F(PlannerCoreTest, StopTellsQuestionsToEnd) {
  Register("vlm", "a");
  std::promise<void> begun, ended;
  core_.RunQuestion(
      "vlm", NotCancelled(),
      [&](const absl::Status& status, const std::atomic<bool>& end) {
        EXPECT_TRUE(status.ok());
        begun.set_value();
        while (!end.load()) std::this_thread::yield();
        ended.set_value();
      });
  begun.get_future().wait();
  core_.BeginStop();
  ended.get_future().wait();
}

TEST_F(PlannerCoreTest, PlansExpireByTheClock) {
  Register("vlm", "a");
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  ASSERT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  clock_.Advance(std::chrono::seconds(600));
  while (core_.held().steps > 0) std::this_thread::yield();
  EXPECT_THAT(std::string(Read({"vlm", 1, 0, 0}).status().message()),
              HasSubstr("has expired"));
}

TEST_F(PlannerCoreTest, JobsWhosePlansAreStillNeededAreKept) {
  Register("vlm", "a");
  constexpr auto kDay = std::chrono::hours(24);
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1, 7 * kDay).ok());
  planner_.WaitForPlans(1);
  ASSERT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  Register("other", "a");
  clock_.Advance(7 * kDay);
  while (core_.registry().size() > 1) std::this_thread::yield();
  EXPECT_TRUE(Read({"vlm", 1, 0, 0}).ok());
}

TEST_F(PlannerCoreTest, JobsThatNobodyUsesAreRemoved) {
  Register("idle", "a");
  Register("vlm", "a");
  clock_.Advance(std::chrono::hours(7 * 24 - 1));
  ASSERT_TRUE(Submit({"vlm", 1, 0, 0}, 1).ok());
  ASSERT_TRUE(Read({"vlm", 1, 0, 0}).ok());
  clock_.Advance(std::chrono::hours(1));
  while (core_.registry().size() > 1) std::this_thread::yield();
  EXPECT_THAT(core_.registry().Names(), ElementsAre("vlm"));
  EXPECT_EQ(Submit({"idle", 1, 0, 0}, 1).code(), absl::StatusCode::kNotFound);
  // Whoever comes back does so with the next attempt.
  EXPECT_EQ(Register("idle", "a"), 2);
  clock_.Advance(std::chrono::hours(7 * 24));
  while (core_.registry().size() > 0) std::this_thread::yield();
}

// Many submitters, readers, cancellers and restarts at once: every read of a
// key gets one and the same plan. Worth most under ThreadSanitizer.
TEST(PlannerCoreRaceTest, OnePlanAKeyUnderLoad) {
  FakeClock clock;
  PuppetPlanner planner;
  TextCodec codec;
  PlannerCoreOptions options;
  options.planner_threads = 3;
  options.steps.max_steps_per_replica = 64;
  PlannerCore core(options, &planner, &codec, &clock, nullptr);
  const auto Register = [&core](const std::string& request_id) {
    Registration registration;
    registration.request_id = request_id;
    registration.job.name = "vlm";
    registration.job.parallelism.pipeline_parallel = 2;
    registration.pinned.emplace();
    registration.pinned_digest = "layout of vlm 0";
    std::promise<uint64_t> attempt;
    core.RegisterJob(registration, NotCancelled(), [&attempt](auto job) {
      attempt.set_value((*job)->attempt);
    });
    return attempt.get_future().get();
  };
  for (int round = 0; round < 3; ++round) {
    const uint64_t attempt = Register("start " + std::to_string(round));
    const auto job = *core.registry().Find("vlm");
    constexpr int kSteps = 40;
    constexpr int kReaders = 3;
    std::vector<std::vector<StepResult>> got(
        kReaders, std::vector<StepResult>(kSteps, nullptr));
    std::vector<std::thread> threads;
    std::atomic<int> submitted = 0;
    threads.emplace_back([&] {
      for (int step = 0; step < kSteps; ++step) {
        StepSubmission submission;
        submission.key = {"vlm", attempt, static_cast<uint64_t>(step), 0};
        submission.job = job;
        submission.layout_digest = job->layout_digest;
        submission.batch = LabelledBatch(step);
        submission.batch_digest = std::to_string(step);
        submission.needed_in = milliseconds(step % 4);
        ASSERT_TRUE(core.SubmitStep(submission).ok());
        ++submitted;
        if (step % 5 == 0) clock.Advance(milliseconds(1));
      }
      clock.Advance(milliseconds(10));
    });
    for (int reader = 0; reader < kReaders; ++reader) {
      threads.emplace_back([&, reader] {
        for (int step = 0; step < kSteps; ++step) {
          while (submitted <= step) std::this_thread::yield();
          std::promise<StepResult> answer;
          core.ReadStep({"vlm", attempt, static_cast<uint64_t>(step), 0},
                        [&answer](StepResult result) {
                          answer.set_value(std::move(result));
                        });
          got[reader][step] = answer.get_future().get();
        }
      });
    }
    threads.emplace_back([&] {
      std::mt19937 random(round);
      while (submitted < kSteps) {
        const StepKey key{"vlm", attempt, random() % kSteps, 0};
        const uint64_t handle = core.ReadStep(key, [](const StepResult&) {});
        core.CancelRead(key, handle);
        core.held();
        core.load();
      }
    });
    for (std::thread& thread : threads) thread.join();
    for (int step = 0; step < kSteps; ++step) {
      for (int reader = 0; reader < kReaders; ++reader) {
        ASSERT_TRUE(got[reader][step].ok()) << got[reader][step].status();
        EXPECT_EQ(*got[reader][step], *got[0][step]);
      }
    }
  }
}

}  // namespace
}  // namespace pipeweaver::server
