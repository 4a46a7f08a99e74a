// Random problems, lowered, checked and executed under rendezvous: nothing
// hangs, every stage finds its inputs; and what was made wrong does hang.

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "search/lower/lower.h"
#include "search/lower/program_checker.h"
#include "search/lower/testing/rendezvous_executor.h"
#include "search/plan/plan_checker.h"
#include "search/plan/safe_order.h"
#include "search/plan/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

struct Lowered {
  StepProblem step;
  StepPrograms programs;
};

Lowered RandomLowered(std::mt19937_64& random) {
  Lowered l;
  l.step = testing::RandomStepProblem(random);
  const Problem& problem = l.step.problem;
  const Schedule schedule = testing::Uniform(random, 0, 1) == 0
                                ? testing::RandomSchedule(problem, random)
                                : *SafeOrder(problem);
  const auto checked = CheckSchedule(problem, schedule);
  ProgramLimits limits = {problem.memory_limit_bytes,
                          static_cast<int>(testing::Uniform(random, 1, 3))};
  l.programs = *Lower(l.step, schedule, checked->times, limits);
  // As tight as it gets, in half of the cases: waits then stand early.
  if (testing::Uniform(random, 0, 1) == 0) {
    for (int r = 0; r < problem.ranks; ++r) {
      limits.memory_limit_bytes[r] =
          (checked->peak_bytes[r] + l.programs.peak_bytes[r]) / 2;
    }
    auto tight = Lower(l.step, schedule, checked->times, limits);
    if (tight.ok()) l.programs = *std::move(tight);
  }
  const absl::Status status =
      CheckPrograms(l.step, l.programs, {problem.memory_limit_bytes, 3});
  EXPECT_TRUE(status.ok()) << status;
  return l;
}

TEST(RendezvousTest, NothingHangsInAnyInterleaving) {
  std::mt19937_64 random(1);
  for (int i = 0; i < 3000; ++i) {
    const auto [step, programs] = RandomLowered(random);
    for (int k = 0; k < 2; ++k) {
      const absl::Status status =
          testing::ExecuteInterleaved(step, programs, random);
      ASSERT_TRUE(status.ok()) << "problem " << i << ": " << status;
    }
  }
}

TEST(RendezvousTest, NothingHangsOnThreads) {
  std::mt19937_64 random(2);
  for (int i = 0; i < 150; ++i) {
    const auto [step, programs] = RandomLowered(random);
    const absl::Status status = testing::ExecuteOnThreads(programs);
    ASSERT_TRUE(status.ok()) << "problem " << i << ": " << status;
  }
}

// The executor is worth something only if it does not forgive.
TEST(RendezvousTest, PostsOutOfOrderAreNotForgiven) {
  std::mt19937_64 random(3);
  int swapped = 0;
  int refused = 0;
  for (int i = 0; i < 300; ++i) {
    auto [step, programs] = RandomLowered(random);
    // Two posts of a rank to the same peer.
    for (auto& program : programs.ranks) {
      std::vector<size_t> posts;
      for (size_t k = 0; k < program.size(); ++k) {
        if (program[k].kind == ActionKind::kPostRecv) posts.push_back(k);
      }
      if (posts.size() < 2) continue;
      const Transfer& x = programs.transfers[program[posts[0]].transfer];
      const Transfer& y = programs.transfers[program[posts[1]].transfer];
      if (x.from_rank != y.from_rank) continue;
      std::swap(program[posts[0]], program[posts[1]]);
      ++swapped;
      refused +=
          testing::ExecuteInterleaved(step, programs, random).ok() ? 0 : 1;
      break;
    }
  }
  EXPECT_GT(swapped, 50);
  EXPECT_EQ(refused, swapped);
}

}  // namespace
}  // namespace pipeweaver::search
