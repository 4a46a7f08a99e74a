// Lower bounds against the exhaustive oracle, on small pipelines of very unlike
// groups, where the bounds beyond the problem format's matter most.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "search/problem/bound.h"
#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_validation.h"
#include "search/problem/ramp_bound.h"
#include "search/strategy/testing/oracle.h"
#include "search/strategy/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

// Some sweeps, most of them over the same ranks and ever longer or shorter; now
// and then in a chain or joined, with split backwards, frozen, over other ranks
// or one rank twice, with choices that trade F for B.
Problem UnlikeGroupsProblem(uint64_t seed) {
  constexpr size_t kMostPairs = 7;
  std::mt19937_64 random(seed);
  const auto below = [&random](int64_t bound) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(bound));
  };
  const auto chance = [&below](int percent) { return below(100) < percent; };
  Problem problem;
  problem.ranks = chance(70) ? 2 : 3;
  problem.memory_limit_bytes.assign(problem.ranks, 100);
  problem.split_backward = chance(15);
  const bool uneven = chance(40), transfers = chance(50), frozen = chance(15);
  const bool foreign = chance(20), alike = chance(30), choices = chance(30);
  const int joined = chance(35) ? 70 : 0;
  // From one sweep's length to the next's.
  const int64_t tenths = 5 + below(25);
  const int64_t back = 1 + below(6);
  const int64_t unit = chance(10) ? 100'000 : 1;
  std::vector<int> route(problem.ranks);
  std::iota(route.begin(), route.end(), 0);
  if (chance(20)) route.push_back(static_cast<int>(below(problem.ranks)));
  int64_t length = 1 + below(8);
  for (size_t pairs = 0; true;) {
    std::vector<int> ranks = route;
    if (foreign && chance(40)) {
      ranks.resize(1 + below(2));
      for (int& rank : ranks) rank = static_cast<int>(below(problem.ranks));
    }
    pairs += ranks.size();
    if (pairs > kMostPairs) return problem;
    const int s = static_cast<int>(problem.sweeps.size());
    Sweep sweep;
    sweep.id = std::to_string(s);
    sweep.backward = !(frozen && chance(40));
    for (int before = s - 1; before >= 0 && chance(joined); --before) {
      if (sweep.backward || !problem.sweeps[before].backward) {
        sweep.after.push_back(before);
      }
    }
    if (!chance(alike ? 80 : 20)) {
      length = std::min<int64_t>(1 + length * tenths / 10, 60);
    }
    const int64_t own_back = chance(50) ? back : 1 + below(6);
    for (const int rank : ranks) {
      Stage stage;
      stage.rank = rank;
      stage.transfer_ns = transfers ? below(chance(20) ? 20 : 4) : 0;
      const bool split = problem.split_backward && chance(70);
      for (int c = choices && chance(40) ? 2 : 1; c > 0; --c) {
        Choice choice;
        choice.forward_ns = length + (uneven ? below(1 + length) : 0);
        choice.input_grad_ns =
            own_back * length / 2 + (uneven ? below(1 + length) : 0);
        if (c == 2) choice.forward_ns += 1 + below(4);
        if (c == 2) choice.input_grad_ns /= 2;
        choice.weight_grad_ns = split ? 1 + below(length) : 0;
        choice.forward_ns = choice.forward_ns * unit + below(unit);
        choice.input_grad_ns = choice.input_grad_ns * unit + below(unit);
        choice.weight_grad_ns *= unit;
        stage.choices.Mutable().push_back(choice);
      }
      sweep.stages.push_back(std::move(stage));
    }
    problem.sweeps.push_back(std::move(sweep));
  }
}

TEST(BoundOracleTest, NoScheduleIsBelowAnyBound) {
  uint64_t exact = 0, by_ramps = 0, met = 0;
  const uint64_t problems = 30 * FuzzProblems();
  for (uint64_t seed = 1; seed <= problems; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const Problem problem = UnlikeGroupsProblem(seed);
    ASSERT_TRUE(ValidateProblem(problem).ok());
    const ProblemGraph graph = BuildProblemGraph(problem);
    const LowerBounds bounds = FindLowerBounds(graph);
    EXPECT_LE(bounds.path_ns, bounds.flow_ns);
    const auto path_ns = static_cast<uint64_t>(bounds.path_ns);
    const auto flow_ns = static_cast<uint64_t>(bounds.flow_ns);
    const PathBound path = ComputePathBound(graph);
    const std::vector<int32_t> routes = RoutesOf(graph);
    const uint64_t ramp_ns = RampLowerBound(graph, path, routes, path_ns);
    // With nothing known, it looks at other pairs.
    const uint64_t alone_ns = RampLowerBound(graph, path, routes, 0);
    // That none is below the format's bound is for other tests.
    if (std::max({flow_ns, ramp_ns, alone_ns}) <= path_ns) continue;
    const OracleAnswer oracle = SolveExhaustively(graph);
    ASSERT_TRUE(oracle.makespan_ns.has_value());
    const auto least_ns = static_cast<uint64_t>(*oracle.makespan_ns);
    ASSERT_LE(flow_ns, least_ns);
    ASSERT_LE(ramp_ns, least_ns);
    ASSERT_LE(alone_ns, least_ns);
    if (!oracle.exact) continue;
    ++exact;
    by_ramps += ramp_ns > path_ns ? 1 : 0;
    met += ramp_ns > path_ns && ramp_ns == least_ns ? 1 : 0;
  }
  // Enough problems on which the ramps say more, and all there is to say.
  EXPECT_GT(by_ramps, problems / 20);
  EXPECT_GT(met, 0u);
  RecordProperty("exact", std::to_string(exact));
  RecordProperty("by_ramps", std::to_string(by_ramps));
  RecordProperty("met", std::to_string(met));
}

// Sweeps over the same ranks, some after another, each stage with ways to spend
// time for memory, of which there is little.
Problem ShortOfMemoryProblem(uint64_t seed) {
  constexpr size_t kMostPairs = 4;
  std::mt19937_64 random(seed);
  const auto below = [&random](int64_t bound) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(bound));
  };
  const auto chance = [&below](int percent) { return below(100) < percent; };
  Problem problem;
  problem.ranks = 1 + static_cast<int>(below(3));
  problem.split_backward = chance(30);
  const bool transfers = chance(40), frozen = chance(15), chained = chance(30);
  // One pair at a time and rank, or as its length.
  const bool alone = chance(30);
  const int64_t most_length = 1 + below(12);
  const int64_t most_saved = alone ? 0 : 1 + below(8);
  int64_t most_bytes = 1;  // of a stage's least
  for (size_t pairs = problem.ranks; pairs <= kMostPairs;
       pairs += problem.ranks) {
    const int s = static_cast<int>(problem.sweeps.size());
    Sweep sweep;
    sweep.id = std::to_string(s);
    sweep.backward = !(frozen && chance(30));
    if (s > 0 && chained && chance(50) &&
        (sweep.backward || !problem.sweeps[s - 1].backward)) {
      sweep.after.push_back(s - 1);
    }
    const int64_t length = 1 + below(most_length);
    for (int rank = 0; rank < problem.ranks; ++rank) {
      Stage stage;
      stage.rank = rank;
      stage.transfer_ns = transfers ? below(4) : 0;
      int64_t least_bytes = 100;
      for (int64_t saved = 0; saved <= most_saved; saved += 1 + below(4)) {
        Choice choice;
        choice.forward_ns = length + below(2);
        choice.input_grad_ns = length + saved;
        choice.weight_grad_ns = problem.split_backward ? 1 + below(3) : 0;
        choice.activation_bytes = alone ? 10 : 1 + 9 * length / (1 + saved);
        choice.backward_bytes =
            choice.activation_bytes + (alone ? 0 : below(3));
        choice.weight_grad_bytes =
            alone ? 10 : 1 + below(choice.activation_bytes);
        if (!alone && problem.split_backward && chance(30)) {
          choice.fused_backward_ns = choice.input_grad_ns + 1;
          choice.fused_backward_bytes = 1 + below(choice.backward_bytes);
        }
        least_bytes = std::min(least_bytes, std::max(choice.backward_bytes,
                                                     choice.weight_grad_bytes));
        stage.choices.Mutable().push_back(choice);
      }
      most_bytes = std::max(most_bytes, least_bytes);
      sweep.stages.push_back(std::move(stage));
    }
    problem.sweeps.push_back(std::move(sweep));
  }
  for (int rank = 0; rank < problem.ranks; ++rank) {
    problem.memory_limit_bytes.push_back(
        alone ? 10 : most_bytes * (10 + below(15)) / 10);
  }
  return problem;
}

// With memory for some pairs at a time, and a choice that there is none for, so
// that all could be short of it.
Problem UnlikeGroupsInMemoryProblem(uint64_t seed) {
  Problem problem = UnlikeGroupsProblem(seed);
  std::mt19937_64 random(seed);
  const uint64_t most_bytes = 1 + random() % 50;
  for (Sweep& sweep : problem.sweeps) {
    for (Stage& stage : sweep.stages) {
      for (Choice& choice : stage.choices.Mutable()) {
        choice.activation_bytes =
            1 + static_cast<int64_t>(random() % most_bytes);
        choice.backward_bytes = choice.activation_bytes;
        choice.weight_grad_bytes = choice.activation_bytes;
      }
      Choice too_much = stage.choices.Mutable().front();
      too_much.activation_bytes = 1000;
      stage.choices.Mutable().push_back(too_much);
    }
  }
  return problem;
}

TEST(BoundOracleTest, NoScheduleIsBelowTheBoundByMemory) {
  uint64_t by_memory = 0, met = 0;
  const uint64_t problems = 10 * FuzzProblems();
  for (uint64_t seed = 1; seed <= problems; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Problem problem = seed % 2 == 0 ? ShortOfMemoryProblem(seed)
                                    : UnlikeGroupsInMemoryProblem(seed);
    ASSERT_TRUE(ValidateProblem(problem).ok());
    const ProblemGraph graph = BuildProblemGraph(problem);
    const int64_t flow_ns = FlowLowerBound(graph);
    problem.memory_limit_bytes.assign(problem.ranks, 1'000'000);
    if (flow_ns <= FlowLowerBound(BuildProblemGraph(problem))) continue;
    const OracleAnswer oracle = SolveExhaustively(graph);
    // Without a schedule any bound is right.
    if (!oracle.makespan_ns.has_value()) continue;
    ASSERT_LE(flow_ns, *oracle.makespan_ns);
    if (!oracle.exact) continue;
    ++by_memory;
    met += flow_ns == *oracle.makespan_ns ? 1 : 0;
  }
  // Enough problems on which memory says more, and all there is to say.
  EXPECT_GT(by_memory, problems / 20);
  EXPECT_GT(met, 0u);
  RecordProperty("by_memory", std::to_string(by_memory));
  RecordProperty("met", std::to_string(met));
}

}  // namespace
}  // namespace pipeweaver::search
