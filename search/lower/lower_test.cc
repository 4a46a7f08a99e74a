// Lowered programs pass the program checker on random problems, keep to the
// limits, and put actions where executors expect them.

#include "search/lower/lower.h"

#include <algorithm>
#include <limits>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/lower/program_checker.h"
#include "search/plan/plan_checker.h"
#include "search/plan/safe_order.h"
#include "search/plan/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

ProgramLimits Ample(const Problem& problem, int receives_ahead) {
  ProgramLimits limits;
  limits.memory_limit_bytes = problem.memory_limit_bytes;
  limits.max_receives_ahead = receives_ahead;
  return limits;
}

TEST(LowerTest, RandomSchedulesLowerToValidPrograms) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 3000; ++i) {
    SCOPED_TRACE(i);
    const StepProblem step = testing::RandomStepProblem(random);
    const Schedule schedule =
        i % 2 == 0 ? testing::RandomSchedule(step.problem, random)
                   : *SafeOrder(step.problem);
    const auto checked = CheckSchedule(step.problem, schedule);
    ASSERT_TRUE(checked.ok()) << checked.status();
    const ProgramLimits limits =
        Ample(step.problem, static_cast<int>(testing::Uniform(random, 1, 4)));
    const auto programs = Lower(step, schedule, checked->times, limits);
    ASSERT_TRUE(programs.ok()) << programs.status();
    const absl::Status status = CheckPrograms(step, *programs, limits);
    ASSERT_TRUE(status.ok()) << status;
  }
}

// Times only choose places: with wrong ones the programs are still valid.
TEST(LowerTest, ValidWhateverTheTimes) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 1000; ++i) {
    const StepProblem step = testing::RandomStepProblem(random);
    const Schedule schedule = testing::RandomSchedule(step.problem, random);
    StageTimes times = CheckSchedule(step.problem, schedule)->times;
    for (auto& rank : times.ranks) {
      for (auto& interval : rank) {
        interval.start_ns = testing::Uniform(random, 0, 100);
        interval.end_ns = testing::Uniform(random, 0, 100);
      }
    }
    const ProgramLimits limits = Ample(step.problem, 1 + i % 3);
    const auto programs = Lower(step, schedule, times, limits);
    ASSERT_TRUE(programs.ok()) << programs.status();
    const absl::Status status = CheckPrograms(step, *programs, limits);
    ASSERT_TRUE(status.ok()) << status;
  }
}

// Between the peak of activations alone and the peak with ample memory, the
// lowering either keeps within the limit or says that it cannot.
TEST(LowerTest, KeepsWithinTightMemory) {
  std::mt19937_64 random(3);
  int tightened = 0;
  for (int i = 0; i < 1000; ++i) {
    const StepProblem step = testing::RandomStepProblem(random);
    const Schedule schedule = testing::RandomSchedule(step.problem, random);
    const auto checked = CheckSchedule(step.problem, schedule);
    ProgramLimits limits = Ample(step.problem, 2);
    const auto ample = Lower(step, schedule, checked->times, limits);
    ASSERT_TRUE(ample.ok()) << ample.status();
    for (int r = 0; r < step.problem.ranks; ++r) {
      limits.memory_limit_bytes[r] = testing::Uniform(
          random, checked->peak_bytes[r],
          std::max(checked->peak_bytes[r], ample->peak_bytes[r]));
    }
    const auto tight = Lower(step, schedule, checked->times, limits);
    if (!tight.ok()) {
      EXPECT_EQ(tight.status().code(), absl::StatusCode::kResourceExhausted);
      EXPECT_THAT(std::string(tight.status().message()),
                  HasSubstr("over the limit of"));
      continue;
    }
    ++tightened;
    const absl::Status status = CheckPrograms(step, *tight, limits);
    ASSERT_TRUE(status.ok()) << status;
  }
  EXPECT_GT(tightened, 300);
}

// Sweeps over ranks 0 and 1, one a microbatch.
StepProblem TwoRanks(int microbatches, MemoryChoice memory) {
  StepProblem step;
  Problem& problem = step.problem;
  problem.ranks = 2;
  problem.memory_limit_bytes = {1000, 1000};
  step.choices = {{{{memory}, {memory}}}};
  for (int i = 0; i < microbatches; ++i) {
    Choice choice;
    choice.forward_ns = 10;
    choice.input_grad_ns = choice.weight_grad_ns = 10;
    choice.activation_bytes = choice.backward_bytes = 10;
    Sweep sweep;
    sweep.id = "mb" + std::to_string(i);
    sweep.microbatch = i;
    sweep.stages = {{0, 3, {choice}}, {1, 3, {choice}}};
    problem.sweeps.push_back(sweep);
    step.sub_microbatches.push_back({0, i, {0}, 1});
    step.sweeps.push_back({i, 0});
    step.output_bytes.push_back(5);
    step.after_bytes.emplace_back();
  }
  return step;
}

std::vector<ActionKind> Kinds(const std::vector<Action>& program) {
  std::vector<ActionKind> kinds;
  kinds.reserve(program.size());
  for (const Action& a : program) kinds.push_back(a.kind);
  return kinds;
}

TEST(LowerTest, PlacesOfOneMicrobatch) {
  const StepProblem step = TwoRanks(1, {});
  const Schedule schedule = *SafeOrder(step.problem);
  const auto checked = CheckSchedule(step.problem, schedule);
  const auto programs =
      Lower(step, schedule, checked->times, Ample(step.problem, 2));
  ASSERT_TRUE(programs.ok()) << programs.status();
  using enum ActionKind;
  EXPECT_THAT(Kinds(programs->ranks[0]),
              ::testing::ElementsAre(kForward, kPostSend, kPostRecv, kWaitRecv,
                                     kBackward, kGradsReady, kWaitSend));
  EXPECT_THAT(Kinds(programs->ranks[1]),
              ::testing::ElementsAre(kPostRecv, kWaitRecv, kForward, kBackward,
                                     kPostSend, kGradsReady, kWaitSend));
  EXPECT_EQ(programs->makespan_ns, 10 + 3 + 10 + 20 + 3 + 20);
}

TEST(LowerTest, OffloadsBehindForwardAndReloadsBeforeBackward) {
  MemoryChoice offload;
  offload.offload_layers = 1;
  offload.offload_bytes = 7;
  const StepProblem step = TwoRanks(1, offload);
  const Schedule schedule = *SafeOrder(step.problem);
  const auto checked = CheckSchedule(step.problem, schedule);
  const auto programs =
      Lower(step, schedule, checked->times, Ample(step.problem, 2));
  ASSERT_TRUE(programs.ok()) << programs.status();
  using enum ActionKind;
  EXPECT_THAT(Kinds(programs->ranks[0]),
              ::testing::ElementsAre(kForward, kOffload, kPostSend, kPostRecv,
                                     kWaitRecv, kWaitCopy, kReload, kWaitCopy,
                                     kBackward, kGradsReady, kWaitSend));
}

TEST(LowerTest, WhatIsOffloadedIsHeldUntilItIsOutAndOnceItComesBack) {
  MemoryChoice offload;
  offload.offload_layers = 1;
  offload.offload_bytes = 70;
  const StepProblem step = TwoRanks(1, offload);
  const Schedule schedule = *SafeOrder(step.problem);
  const auto checked = CheckSchedule(step.problem, schedule);
  ASSERT_TRUE(checked.ok());
  EXPECT_EQ(checked->peak_bytes[1], 10);
  ProgramLimits limits = Ample(step.problem, 2);
  limits.memory_limit_bytes = {1000, 10 + 70};
  const auto programs = Lower(step, schedule, checked->times, limits);
  ASSERT_TRUE(programs.ok()) << programs.status();
  EXPECT_EQ(programs->peak_bytes[1], 10 + 70);
  EXPECT_TRUE(CheckPrograms(step, *programs, limits).ok());
  --limits.memory_limit_bytes[1];
  EXPECT_EQ(Lower(step, schedule, checked->times, limits).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(CheckPrograms(step, *programs, limits).message()),
              HasSubstr("80 bytes live, over the limit of 79"));
}

TEST(LowerTest, NamesWhatTransfersLack) {
  const StepProblem step = TwoRanks(2, {});
  const Schedule schedule = *SafeOrder(step.problem);
  const auto checked = CheckSchedule(step.problem, schedule);
  ProgramLimits limits = Ample(step.problem, 2);
  limits.memory_limit_bytes = {1000, checked->peak_bytes[1] - 1};
  const auto programs = Lower(step, schedule, checked->times, limits);
  EXPECT_EQ(programs.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(programs.status().message()),
              HasSubstr("rank 1: activations and transfers take 10 bytes at F "
                        "of mb0 stage 1, over the limit of 9"));
}

TEST(LowerTest, RefusesACircle) {
  const StepProblem step = TwoRanks(1, {});
  Schedule schedule = *SafeOrder(step.problem);
  const auto checked = CheckSchedule(step.problem, schedule);
  std::reverse(schedule.ranks[1].begin(), schedule.ranks[1].end());
  EXPECT_EQ(Lower(step, schedule, checked->times, Ample(step.problem, 2))
                .status()
                .code(),
            absl::StatusCode::kFailedPrecondition);
}

}  // namespace
}  // namespace pipeweaver::search
