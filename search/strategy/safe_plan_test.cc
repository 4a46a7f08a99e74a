// Tests of safe_plan.h: what fits, what does not, and what the error says.

#include "search/strategy/safe_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "search/problem/field_error.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/strategy.h"

namespace pipeweaver::search {
namespace {

Choice Bytes(int64_t activation, int64_t backward) {
  Choice choice;
  choice.forward_ns = choice.input_grad_ns = 1;
  choice.activation_bytes = activation;
  choice.backward_bytes = backward;
  return choice;
}

// Sweeps of one stage each on one rank.
Problem OneRank(int64_t limit_bytes, std::vector<std::vector<Choice>> choices,
                std::vector<std::vector<int>> after) {
  Problem problem;
  problem.ranks = 1;
  problem.memory_limit_bytes = {limit_bytes};
  for (size_t s = 0; s < choices.size(); ++s) {
    Sweep sweep;
    sweep.id = std::to_string(s);
    sweep.after.assign(after[s].begin(), after[s].end());
    sweep.stages = {{.rank = 0, .choices = std::move(choices[s])}};
    problem.sweeps.push_back(std::move(sweep));
  }
  return problem;
}

// Two ranks; limits that a random order of F, backwards run as soon as they
// can, comes to with random choices.
Problem TightProblem(int seed) {
  std::mt19937_64 random(seed);
  const auto below = [&random](int most) {
    return static_cast<int>(random() % most);
  };
  constexpr int kSweeps = 60;
  std::vector<std::vector<Choice>> choices(kSweeps);
  std::vector<std::vector<int>> after(kSweeps), consumers(kSweeps);
  std::vector<int> picked(kSweeps), rank(kSweeps);
  for (int s = 0; s < kSweeps; ++s) {
    for (int c = 0; c < 2; ++c) {
      choices[s].push_back(Bytes(1 + below(30), 1 + below(60)));
    }
    picked[s] = below(2);
    rank[s] = below(2);
    for (int i = below(3); i > 0 && s > 0; --i) {
      const int before = std::max(0, s - 1 - below(8));
      if (!after[s].empty() && after[s][0] == before) continue;
      after[s].push_back(before);
      consumers[before].push_back(s);
    }
  }
  std::vector<int64_t> least;
  for (int trial = 0; trial < 60; ++trial) {
    std::vector<int64_t> held(2, 0), peak(2, 0);
    std::vector<int> state(kSweeps, 0);  // 1: after F, 2: after the backward
    const auto all = [&](const std::vector<int>& sweeps, int at_least) {
      return std::all_of(sweeps.begin(), sweeps.end(),
                         [&](int s) { return state[s] >= at_least; });
    };
    for (int left = kSweeps; left > 0;) {
      int next = -1, best = -1;
      for (int s = 0; s < kSweeps; ++s) {
        const Choice& choice = choices[s][picked[s]];
        if (state[s] == 1 && all(consumers[s], 2)) {
          held[rank[s]] -= choice.activation_bytes;
          peak[rank[s]] =
              std::max(peak[rank[s]], held[rank[s]] + choice.backward_bytes);
          state[s] = 2;
          --left;
        } else if (state[s] == 0 && all(after[s], 1)) {
          const int value = s + below(1 + trial % 30);
          if (value > best) {
            best = value;
            next = s;
          }
        }
      }
      if (next < 0) continue;
      held[rank[next]] += choices[next][picked[next]].activation_bytes;
      peak[rank[next]] = std::max(peak[rank[next]], held[rank[next]]);
      state[next] = 1;
    }
    if (least.empty() || peak[0] + peak[1] < least[0] + least[1]) least = peak;
  }
  Problem problem = OneRank(0, choices, after);
  problem.ranks = 2;
  problem.memory_limit_bytes = least;
  for (int s = 0; s < kSweeps; ++s) problem.sweeps[s].stages[0].rank = rank[s];
  return problem;
}

std::string ErrorOf(const Problem& problem) {
  return std::string(
      FindSafePlan(BuildProblemGraph(problem)).status().message());
}

TEST(SafePlanTest, ComponentsFitOneByOne) {
  // Two components of 10 bytes each within 10.
  const auto plan = FindSafePlan(BuildProblemGraph(
      OneRank(10, {{Bytes(10, 10)}, {Bytes(10, 10)}}, {{}, {}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->components.size(), 2u);
}

TEST(SafePlanTest, AChainHoldsAllItsForwards) {
  EXPECT_EQ(ErrorOf(OneRank(10, {{Bytes(6, 6)}, {Bytes(5, 5)}}, {{}, {0}})),
            "no schedule exists: rank 0 would hold 11 bytes, its limit is 10");
  EXPECT_EQ(ErrorOf(OneRank(11, {{Bytes(6, 6)}, {Bytes(5, 5)}}, {{}, {0}})),
            "");
}

TEST(SafePlanTest, PicksChoicesByWhenTheirBackwardRuns) {
  // The lean choice needs 10 bytes in its backward: the first sweep's backward
  // runs when nothing else is held, the second's above the first's activation.
  const std::vector<Choice> choices = {Bytes(4, 4), Bytes(1, 10)};
  const auto plan = FindSafePlan(
      BuildProblemGraph(OneRank(10, {choices, choices}, {{}, {0}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->choice, (std::vector<int32_t>{1, 0}));
}

TEST(SafePlanTest, BranchesWhereTheOrderIsFree) {
  // Two producers of one sink; only with the second's backward first do lean
  // choices fit.
  const auto plan = FindSafePlan(BuildProblemGraph(
      OneRank(10, {{Bytes(3, 3)}, {Bytes(1, 8), Bytes(8, 8)}, {Bytes(1, 1)}},
              {{}, {}, {0, 1}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_TRUE(plan->components[0].forwards_first);
}

TEST(SafePlanTest, SeveralSinksMayTakeTurns) {
  // A producer of 4 bytes with two consumers of 6 each: not both at once.
  const auto plan = FindSafePlan(BuildProblemGraph(OneRank(
      10, {{Bytes(4, 4)}, {Bytes(6, 6)}, {Bytes(6, 6)}}, {{}, {0}, {0}})));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_FALSE(plan->components[0].forwards_first);
  EXPECT_EQ(plan->components[0].steps.size(), 6u);
  EXPECT_NE(ErrorOf(OneRank(9, {{Bytes(4, 4)}, {Bytes(6, 6)}, {Bytes(6, 6)}},
                            {{}, {0}, {0}}))
                .find("no schedule exists: rank 0"),
            std::string::npos);
}

// A producer of a byte with many consumers of a byte each, room for two.
TEST(SafePlanTest, ManyConsumersRunOneByOne) {
  constexpr int kSweeps = 20'000;
  std::vector<std::vector<Choice>> choices(kSweeps, {Bytes(1, 1)});
  std::vector<std::vector<int>> after(kSweeps, {0});
  after[0].clear();
  const auto plan = FindSafePlan(BuildProblemGraph(OneRank(2, choices, after)));
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->components[0].steps.size(), 2u * kSweeps);
}

// Consumers that each need many producers and half of what there is, and a byte
// more: no order of producers helps, which needs no search.
TEST(SafePlanTest, ProvesWhatNoOrderSolves) {
  constexpr int kHalf = 1500;
  std::vector<std::vector<Choice>> choices(kHalf, {Bytes(1, 1)});
  std::vector<std::vector<int>> after(kHalf);
  std::vector<int> all(kHalf);
  std::iota(all.begin(), all.end(), 0);
  for (int i = 0; i < 2; ++i) {
    choices.push_back({Bytes(kHalf, kHalf)});
    after.push_back(all);
  }
  EXPECT_EQ(
      ErrorOf(OneRank(2 * kHalf - 1, choices, after)),
      "no schedule exists: rank 0 would hold 3000 bytes, its limit is 2999");
}

// Rank 0 holds 15 bytes where its backwards run in reverse order, 10 where not;
// rank 1 holds 10 in any order.
TEST(SafePlanTest, NamesTheRankThatIsTheReason) {
  const auto problem = [](std::vector<int64_t> limits) {
    Problem three = OneRank(0,
                            {{Bytes(5, 5)},
                             {Bytes(1, 10)},
                             {Bytes(5, 5)},
                             {Bytes(5, 5)},
                             {Bytes(1, 1)}},
                            {{}, {}, {}, {}, {0, 1, 2, 3}});
    three.ranks = 3;
    three.memory_limit_bytes = std::move(limits);
    three.sweeps[2].stages[0].rank = three.sweeps[3].stages[0].rank = 1;
    three.sweeps[4].stages[0].rank = 2;
    return three;
  };
  EXPECT_EQ(ErrorOf(problem({10, 10, 9})), "");
  const absl::Status status =
      FindSafePlan(BuildProblemGraph(problem({10, 5, 9}))).status();
  EXPECT_EQ(status.message(),
            "no schedule exists: rank 1 would hold 10 bytes, its limit is 5");
  EXPECT_TRUE(absl::IsResourceExhausted(status));
  const FieldErrorParts parts = GetFieldErrorParts(status);
  EXPECT_EQ(parts.field, "memory_limit_bytes[1]");
  EXPECT_EQ(parts.value, "5");
  EXPECT_EQ(parts.rule, status.message());
}

// The leanest ways in the first order do not fit here, and an exhaustive search
// spends its work near where they went wrong.
TEST(SafePlanTest, FindsOrdersThatAreNotTheFirst) {
  const auto plan = FindSafePlan(BuildProblemGraph(TightProblem(/*seed=*/817)));
  EXPECT_TRUE(plan.ok()) << plan.status();
}

// Many sweeps of three ways to run, each after some before it, that no search
// has an answer for.
Problem HopelessProblem() {
  std::mt19937_64 random(3);
  std::vector<std::vector<Choice>> choices;
  std::vector<std::vector<int>> after;
  for (int i = 0; i < 60; ++i) {
    choices.emplace_back();
    for (int c = 0; c < 3; ++c) {
      // One after the other: compilers choose the order of arguments.
      const int64_t backward = 60 + static_cast<int64_t>(random() % 240);
      const int64_t activation = 20 + static_cast<int64_t>(random() % 80);
      choices.back().push_back(Bytes(activation, backward));
    }
    after.emplace_back();
    for (int j = 0; j < i && after.back().size() < 2; ++j) {
      if (random() % 16 == 0) after.back().push_back(j);
    }
  }
  return OneRank(530, choices, after);
}

TEST(SafePlanTest, SaysWhenItGaveUp) {
  const std::string error = ErrorOf(HopelessProblem());
  EXPECT_EQ(
      error.rfind("no schedule was found, one may exist: rank 0 would", 0), 0u)
      << error;
}

TEST(SafePlanTest, SpendsNoMoreWorkThanItMay) {
  const ProblemGraph graph = BuildProblemGraph(TightProblem(817));
  const auto plan = FindSafePlan(graph, SearchBudget(), /*most_work=*/1000);
  EXPECT_EQ(
      plan.status().message().rfind("no schedule was found, one may exist", 0),
      0u)
      << plan.status();
}

// What takes more than the first descent.
TEST(SafePlanTest, IsNotSearchedForOnceCancelled) {
  const ProblemGraph graph = BuildProblemGraph(TightProblem(817));
  std::atomic<bool> cancelled = false;
  SearchBudget budget;
  budget.cancelled = &cancelled;
  EXPECT_TRUE(FindSafePlan(graph, budget).ok());
  cancelled = true;
  EXPECT_FALSE(FindSafePlan(graph, budget).ok());
}

// Each group stands on one rank of very many.
TEST(SafePlanTest, GroupsCostOnlyTheRanksThatTheyStandOn) {
  constexpr int kMany = 17'000;
  Problem problem = OneRank(1, std::vector(kMany, std::vector{Bytes(1, 1)}),
                            std::vector<std::vector<int>>(kMany));
  problem.ranks = kMany;
  problem.memory_limit_bytes.assign(kMany, 1);
  for (int i = 0; i < kMany; ++i) problem.sweeps[i].stages[0].rank = i;
  EXPECT_EQ(ErrorOf(problem), "");
}

TEST(SafePlanTest, SweepsWithoutBackwardNeedOnlyTheirOwn) {
  Problem problem = OneRank(10, {{Bytes(10, 0)}, {Bytes(10, 10)}}, {{}, {0}});
  problem.sweeps[0].backward = false;
  EXPECT_EQ(ErrorOf(problem), "");
  problem.memory_limit_bytes = {9};
  EXPECT_EQ(ErrorOf(problem),
            "no schedule exists: rank 0 would hold 10 bytes, its limit is 9");
}

}  // namespace
}  // namespace pipeweaver::search
