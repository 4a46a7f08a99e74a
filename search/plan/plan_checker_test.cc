// The plan checker accepts what is valid and names what is not.

#include "search/plan/plan_checker.h"

#include <functional>
#include <random>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/plan/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

constexpr auto F = StageKind::kForward;
constexpr auto B = StageKind::kBackward;
constexpr auto I = StageKind::kInputGrad;
constexpr auto W = StageKind::kWeightGrad;

Choice MakeChoice(int64_t forward_ns, int64_t input_grad_ns,
                  int64_t weight_grad_ns, int64_t activation_bytes) {
  Choice c;
  c.forward_ns = forward_ns;
  c.input_grad_ns = input_grad_ns;
  c.weight_grad_ns = weight_grad_ns;
  c.activation_bytes = activation_bytes;
  c.backward_bytes = activation_bytes + 1;
  c.weight_grad_bytes = activation_bytes - 1;
  return c;
}

// One sweep over ranks 0 and 1, transfers of 5 ns.
Problem TwoRanks(bool split) {
  Problem problem;
  problem.ranks = 2;
  problem.split_backward = split;
  problem.memory_limit_bytes = {11, 11};
  Sweep sweep;
  sweep.id = "a";
  sweep.stages = {{0, 5, {MakeChoice(10, 20, 30, 10)}},
                  {1, 5, {MakeChoice(10, 20, 30, 10)}}};
  problem.sweeps = {sweep};
  return problem;
}

Schedule Unsplit() {
  return {{{{F, 0, 0, 0}, {B, 0, 0, 0}}, {{F, 0, 1, 0}, {B, 0, 1, 0}}}};
}

Schedule Split() {
  return {{{{F, 0, 0, 0}, {I, 0, 0, 0}, {W, 0, 0, 0}},
           {{F, 0, 1, 0}, {I, 0, 1, 0}, {W, 0, 1, 0}}}};
}

TEST(PlanCheckerTest, TimesAndPeaks) {
  const auto whole = CheckSchedule(TwoRanks(false), Unsplit());
  ASSERT_TRUE(whole.ok()) << whole.status();
  // F0 0-10, F1 15-25, B1 25-75, B0 80-130.
  EXPECT_EQ(whole->times.makespan_ns, 130);
  EXPECT_EQ(whole->times.ranks[0][1].start_ns, 80);
  EXPECT_EQ(whole->peak_bytes, (std::vector<int64_t>{11, 11}));
  const auto split = CheckSchedule(TwoRanks(true), Split());
  ASSERT_TRUE(split.ok()) << split.status();
  // I1 25-45, I0 50-70, W0 70-100.
  EXPECT_EQ(split->times.makespan_ns, 100);
  EXPECT_TRUE(CheckPlan(TwoRanks(true), Split(), split->times).ok());
}

TEST(PlanCheckerTest, RefusesInexactClaims) {
  const Problem problem = TwoRanks(false);
  StageTimes times = CheckSchedule(problem, Unsplit())->times;
  times.makespan_ns += 1;
  EXPECT_THAT(std::string(CheckPlan(problem, Unsplit(), times).message()),
              HasSubstr("makespan_ns claimed 131, is 130"));
  times.makespan_ns -= 1;
  times.ranks[1][0].start_ns += 1;
  EXPECT_THAT(std::string(CheckPlan(problem, Unsplit(), times).message()),
              HasSubstr("rank 1 position 0"));
  times.ranks[1].pop_back();
  EXPECT_FALSE(CheckPlan(problem, Unsplit(), times).ok());
  times.ranks.pop_back();
  EXPECT_FALSE(CheckPlan(problem, Unsplit(), times).ok());
}

struct Breakage {
  std::string message;
  std::function<void(Problem&, Schedule&)> apply;
  bool split = true;
};

TEST(PlanCheckerTest, NamesEachViolation) {
  const std::vector<Breakage> breakages = {
      {"1 rank lists for 2 ranks",
       [](Problem&, Schedule& s) { s.ranks.pop_back(); }},
      {"is no stage of the problem",
       [](Problem&, Schedule& s) { s.ranks[0][0].sweep = 1; }},
      {"is no stage of the problem",
       [](Problem&, Schedule& s) { s.ranks[0][0].sweep = -1; }},
      {"is no stage of the problem",
       [](Problem&, Schedule& s) { s.ranks[0][0].stage = 2; }},
      {"belongs on rank 1, not 0",
       [](Problem&, Schedule& s) { s.ranks[0][0].stage = 1; }},
      {"choice 1 of 1",
       [](Problem&, Schedule& s) { s.ranks[0][0].choice = 1; }},
      {"F of a stage 0 appears twice",
       [](Problem&, Schedule& s) { s.ranks[0].push_back(s.ranks[0][0]); }},
      {"F of a stage 0 is missing",
       [](Problem&, Schedule& s) { s.ranks[0].erase(s.ranks[0].begin()); }},
      {"I of a stage 0 is missing",
       [](Problem&, Schedule& s) { s.ranks[0].erase(s.ranks[0].begin() + 1); }},
      {"W of a stage 0 is missing",
       [](Problem&, Schedule& s) { s.ranks[0].pop_back(); }},
      {"choice 0 has no fused backward",
       [](Problem&, Schedule& s) { s.ranks[0][1].kind = B; }},
      {"W of a stage 0 is not to run beside its B",
       [](Problem& p, Schedule& s) {
         p.sweeps[0].stages[0].choices.Mutable()[0].fused_backward_ns = 40;
         s.ranks[0][1].kind = B;
       }},
      {"the ranks wait for each other: rank 0 at W of a stage 0",
       [](Problem&, Schedule& s) { std::swap(s.ranks[0][1], s.ranks[0][2]); }},
      {"rank 1: 11 bytes live at I of a stage 1, over the limit of 10",
       [](Problem& p, Schedule&) { p.memory_limit_bytes[1] = 10; }},
      {"the sweep runs forward only",
       [](Problem& p, Schedule&) { p.sweeps[0].backward = false; }},
      {"this stage's backward is not split",
       [](Problem&, Schedule& s) { s.ranks[0][1].kind = I; }, false},
      {"choice 1, but 0 elsewhere in its pair",
       [](Problem& p, Schedule& s) {
         p.sweeps[0].stages[0].choices.Mutable().push_back(
             MakeChoice(1, 1, 1, 1));
         s.ranks[0][1].choice = 1;
       }},
  };
  for (const Breakage& breakage : breakages) {
    Problem problem = TwoRanks(breakage.split);
    Schedule schedule = breakage.split ? Split() : Unsplit();
    breakage.apply(problem, schedule);
    const absl::Status status = CheckSchedule(problem, schedule).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), HasSubstr(breakage.message));
  }
}

TEST(PlanCheckerTest, FusedBackwardUsesItsOwnTimeAndBytes) {
  Problem problem = TwoRanks(true);
  problem.sweeps[0].stages[0].choices.Mutable()[0].fused_backward_ns = 40;
  problem.sweeps[0].stages[0].choices.Mutable()[0].fused_backward_bytes = 3;
  problem.memory_limit_bytes[0] = 10;
  Schedule schedule = Split();
  schedule.ranks[0] = {{F, 0, 0, 0}, {B, 0, 0, 0}};
  const auto checked = CheckSchedule(problem, schedule);
  ASSERT_TRUE(checked.ok()) << checked.status();
  EXPECT_EQ(checked->times.makespan_ns, 90);
  EXPECT_EQ(checked->peak_bytes[0], 10);
}

TEST(PlanCheckerTest, RandomOrdersPassAndLosingAnyStageFails) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 300; ++i) {
    const Problem problem = testing::RandomStepProblem(random).problem;
    Schedule schedule = testing::RandomSchedule(problem, random);
    const auto checked = CheckSchedule(problem, schedule);
    ASSERT_TRUE(checked.ok()) << checked.status();
    EXPECT_TRUE(CheckPlan(problem, schedule, checked->times).ok());
    for (auto& order : schedule.ranks) {
      if (order.empty()) continue;
      order.erase(
          order.begin() +
          testing::Uniform(random, 0, static_cast<int64_t>(order.size()) - 1));
      EXPECT_FALSE(CheckSchedule(problem, schedule).ok());
      break;
    }
  }
}

}  // namespace
}  // namespace pipeweaver::search
