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
        stage.choices.Mutable().push_back(std::move(choice));
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

}  // namespace
}  // namespace pipeweaver::search
