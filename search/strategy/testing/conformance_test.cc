// One suite for all strategies: against the exhaustive oracle on small problems
// of every shape, for any thread count, cancelled, out of time.

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_json.h"
#include "search/problem/problem_validation.h"
#include "search/problem/timing.h"
#include "search/strategy/registry.h"
#include "search/strategy/strategy.h"
#include "search/strategy/testing/oracle.h"
#include "search/strategy/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

// The schedule is complete, runs, fits and takes as long as it says.
void ExpectValid(const ProblemGraph& graph, const SearchResult& result) {
  const auto times = TimeSchedule(graph, result.schedule);
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_EQ(times->makespan_ns, result.makespan_ns);
  const absl::Status fits = CheckMemory(graph, result.schedule);
  EXPECT_TRUE(fits.ok()) << fits;
  EXPECT_GE(result.makespan_ns, FlowLowerBound(graph));
}

class StrategyTest : public testing::TestWithParam<std::string> {
 protected:
  StrategyTest() : strategy_(MakeStrategy(GetParam())) {}
  const std::unique_ptr<Strategy> strategy_;
};

TEST_P(StrategyTest, SmallProblemsAgainstTheOracle) {
  double distance = 0, worst = 0;
  uint64_t worst_seed = 0, solved = 0, infeasible = 0;
  for (uint64_t seed = 1; seed <= FuzzProblems(); ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    RandomProblemOptions shape;
    shape.most_pairs = seed % 8 == 0 ? 5 : 4;
    const Problem problem = RandomProblem(seed, shape);
    ASSERT_TRUE(ValidateProblem(problem).ok());
    const ProblemGraph graph = BuildProblemGraph(problem);
    const OracleAnswer oracle = SolveExhaustively(graph);
    SearchOptions options;
    options.budget.evaluations = 200;
    const auto result = strategy_->Solve(graph, options);
    if (!result.ok()) {
      EXPECT_FALSE(oracle.makespan_ns.has_value()) << result.status();
      EXPECT_EQ(result.status().code(), absl::StatusCode::kResourceExhausted);
      EXPECT_NE(result.status().message().find("no schedule exists: rank"),
                std::string::npos);
      ++infeasible;
      continue;
    }
    ExpectValid(graph, *result);
    if (HasFatalFailure()) return;
    ASSERT_TRUE(oracle.makespan_ns.has_value());
    if (!oracle.exact || *oracle.makespan_ns == 0) continue;
    EXPECT_GE(result->makespan_ns, *oracle.makespan_ns);
    ++solved;
    const double over = static_cast<double>(result->makespan_ns) /
                            static_cast<double>(*oracle.makespan_ns) -
                        1;
    distance += over;
    if (over > worst) {
      worst = over;
      worst_seed = seed;
    }
  }
  ASSERT_GT(solved, 0u);
  EXPECT_GT(infeasible, 0u);
  const double mean = distance / static_cast<double>(solved);
  std::printf(
      "%s: %zu solved, %zu infeasible, mean distance %.3f %%, worst "
      "%.1f %% (seed %zu)\n",
      GetParam().c_str(), static_cast<size_t>(solved),
      static_cast<size_t>(infeasible), 100 * mean, 100 * worst,
      static_cast<size_t>(worst_seed));
  if (GetParam() == "portfolio") {
    EXPECT_LT(mean, 0.01);
  }
}

// A problem with enough to search in.
Problem MiddlingProblem() {
  RandomProblemOptions shape;
  shape.most_pairs = 40;
  uint64_t seed = 1;
  while (true) {
    Problem problem = RandomProblem(seed++, shape);
    if (problem.sweeps.size() < 10 || problem.ranks < 2) continue;
    problem.memory_limit_bytes.assign(problem.ranks, 60);
    return problem;
  }
}

TEST_P(StrategyTest, SameBytesForAnyThreadCount) {
  const Problem problem = MiddlingProblem();
  const ProblemGraph graph = BuildProblemGraph(problem);
  for (const int64_t evaluations : {1, 7, 100, 1000, 4000}) {
    std::vector<std::string> texts;
    for (const int threads : {1, 2, 5}) {
      SearchOptions options;
      options.threads = threads;
      options.budget.evaluations = evaluations;
      const auto result = strategy_->Solve(graph, options);
      ASSERT_TRUE(result.ok()) << result.status();
      ExpectValid(graph, *result);
      EXPECT_LE(result->evaluations, evaluations);
      const auto times = TimeSchedule(graph, result->schedule);
      texts.push_back(ScheduleToJson(problem, result->schedule, *times, {}));
    }
    EXPECT_EQ(texts[0], texts[1]) << evaluations;
    EXPECT_EQ(texts[0], texts[2]) << evaluations;
  }
}

TEST_P(StrategyTest, HasAScheduleEvenWithoutTime) {
  const Problem problem = MiddlingProblem();
  const ProblemGraph graph = BuildProblemGraph(problem);
  const std::atomic<bool> cancelled = true;
  for (const bool cancel : {false, true}) {
    SearchOptions options;
    options.threads = 2;
    options.budget.deadline = std::chrono::steady_clock::now();
    if (cancel) {
      options.budget.deadline.reset();
      options.budget.cancelled = &cancelled;
    }
    const auto result = strategy_->Solve(graph, options);
    ASSERT_TRUE(result.ok()) << result.status();
    ExpectValid(graph, *result);
    EXPECT_EQ(result->evaluations, 1);
  }
}

// Local search makes full rounds where time alone bounds it. A second is enough
// for that, unless the machine stands still meanwhile.
TEST_P(StrategyTest, ATimeBudgetSearchesAsHardAsAnEvaluationBudget) {
  const ProblemGraph graph = BuildProblemGraph(MiddlingProblem());
  SearchOptions options;
  options.budget.evaluations = 100;
  const auto few = strategy_->Solve(graph, options);
  ASSERT_TRUE(few.ok());
  options.budget = {};
  for (int seconds = 1;; seconds *= 2) {
    options.budget.deadline =
        std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    const auto many = strategy_->Solve(graph, options);
    ASSERT_TRUE(many.ok());
    if (many->makespan_ns <= few->makespan_ns) break;
    ASSERT_LT(seconds, 16) << many->makespan_ns << " after "
                           << many->evaluations << " evaluations, but "
                           << few->makespan_ns << " after few";
  }
}

TEST_P(StrategyTest, ADeadlineThatIsNotReachedChangesNothing) {
  const Problem problem = MiddlingProblem();
  const ProblemGraph graph = BuildProblemGraph(problem);
  for (const int64_t evaluations : {1, 2, 5, 50, 301}) {
    std::vector<std::string> texts;
    for (const int seconds : {0, 5, 3600}) {
      SearchOptions options;
      options.budget.evaluations = evaluations;
      if (seconds > 0) {
        options.budget.deadline =
            std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
      }
      const auto result = strategy_->Solve(graph, options);
      ASSERT_TRUE(result.ok()) << result.status();
      EXPECT_LE(result->evaluations, evaluations);
      const auto times = TimeSchedule(graph, result->schedule);
      texts.push_back(ScheduleToJson(problem, result->schedule, *times, {}));
    }
    EXPECT_EQ(texts[0], texts[1]) << evaluations;
    EXPECT_EQ(texts[0], texts[2]) << evaluations;
  }
}

TEST_P(StrategyTest, TakesAnyWarmStart) {
  const Problem problem = MiddlingProblem();
  const ProblemGraph graph = BuildProblemGraph(problem);
  SearchOptions options;
  options.budget.evaluations = 50;
  const auto first = strategy_->Solve(graph, options);
  ASSERT_TRUE(first.ok());
  Schedule other;  // of a larger problem
  other.ranks = {{{.kind = StageKind::kForward, .sweep = 1000}}};
  for (const Schedule* warm :
       std::initializer_list<const Schedule*>{&first->schedule, &other}) {
    options.warm_start = warm;
    const auto result = strategy_->Solve(graph, options);
    ASSERT_TRUE(result.ok());
    ExpectValid(graph, *result);
    if (warm == &first->schedule && GetParam() == "portfolio") {
      EXPECT_LE(result->makespan_ns, first->makespan_ns);
    }
  }
}

TEST_P(StrategyTest, TakesAnyWarmSettings) {
  const Problem problem = MiddlingProblem();
  const ProblemGraph graph = BuildProblemGraph(problem);
  SearchOptions options;
  options.budget.evaluations = 50;
  const auto first = strategy_->Solve(graph, options);
  ASSERT_TRUE(first.ok());
  std::vector<std::vector<int32_t>> all = {
      first->settings,
      {},
      {1},
      std::vector<int32_t>(first->settings.size(), 1 << 30)};
  for (size_t i = 0; i < first->settings.size(); ++i) {
    for (const int32_t number : {-1, 0, 1, 7, 1 << 20, 1 << 30}) {
      all.push_back(first->settings);
      all.back()[i] = number;
    }
  }
  for (const std::vector<int32_t>& settings : all) {
    options.warm_settings = settings;
    for (const int64_t evaluations : {1, 2, 50}) {
      options.budget.evaluations = evaluations;
      const auto result = strategy_->Solve(graph, options);
      ASSERT_TRUE(result.ok());
      EXPECT_LE(result->evaluations, evaluations);
      ExpectValid(graph, *result);
    }
  }
}

TEST_P(StrategyTest, DurationsMayBeAsLongAsTheyComeAndMemoryZero) {
  Problem problem = MiddlingProblem();
  for (Sweep& sweep : problem.sweeps) {
    for (Stage& stage : sweep.stages) {
      for (Choice& choice : stage.choices.Mutable()) {
        choice.activation_bytes = choice.backward_bytes =
            choice.weight_grad_bytes = choice.fused_backward_bytes = 0;
      }
    }
  }
  problem.memory_limit_bytes.assign(problem.ranks, 0);
  problem.sweeps[0].stages[0].transfer_ns = kMostQuantity;
  problem.sweeps[1].stages[0].transfer_ns = 4 * (kMostQuantity / 5);
  problem.sweeps[2].stages[0].choices.Mutable()[0].forward_ns = kMostQuantity;
  ASSERT_TRUE(ValidateProblem(problem).ok());
  SearchOptions options;
  options.budget.evaluations = 50;
  const auto result = strategy_->Solve(BuildProblemGraph(problem), options);
  ASSERT_TRUE(result.ok()) << result.status();
  ExpectValid(BuildProblemGraph(problem), *result);
}

// A bound that the caller knows changes nothing, however long the times are.
TEST_P(StrategyTest, TakesTheBoundOfLongTimes) {
  Problem problem = MiddlingProblem();
  for (Sweep& sweep : problem.sweeps) {
    for (Stage& stage : sweep.stages) {
      for (Choice& choice : stage.choices.Mutable()) {
        choice.forward_ns += int64_t{1} << 56;
      }
    }
  }
  ASSERT_TRUE(ValidateProblem(problem).ok());
  const ProblemGraph graph = BuildProblemGraph(problem);
  ASSERT_GE(graph.pairs, 1 << 4);  // times sum up to 2^60 or more
  SearchOptions options;
  options.budget.evaluations = 50;
  const auto without = strategy_->Solve(graph, options);
  options.lower_bound_ns = LowerBound(graph);
  const auto with = strategy_->Solve(graph, options);
  ASSERT_TRUE(without.ok() && with.ok());
  EXPECT_EQ(with->evaluations, without->evaluations);
  EXPECT_EQ(with->makespan_ns, without->makespan_ns);
}

TEST_P(StrategyTest, StagesWithoutBackwardRunAsFastAsMemoryAllows) {
  Problem problem;
  problem.ranks = 1;
  problem.memory_limit_bytes = {10};
  Stage stage{.rank = 0, .choices = std::vector<Choice>(3)};
  const int64_t forward_ns[] = {1, 50, 100}, bytes[] = {11, 10, 1};
  for (int c = 0; c < 3; ++c) {
    Choice& choice = stage.choices.Mutable()[c];
    choice.forward_ns = forward_ns[c];
    choice.activation_bytes = bytes[c];
  }
  Sweep& sweep = problem.sweeps.emplace_back();
  sweep.id = "frozen";
  sweep.backward = false;
  sweep.stages = {stage};
  SearchOptions options;
  options.budget.evaluations = 50;
  const auto result = strategy_->Solve(BuildProblemGraph(problem), options);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->makespan_ns, 50);
}

INSTANTIATE_TEST_SUITE_P(All, StrategyTest, testing::ValuesIn(StrategyNames()),
                         [](const auto& info) {
                           std::string name = info.param;
                           for (char& c : name) {
                             if (c == '-' || c == '*') c = '_';
                           }
                           return name;
                         });

}  // namespace
}  // namespace pipeweaver::search
