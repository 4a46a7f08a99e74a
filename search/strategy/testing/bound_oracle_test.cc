// Lower bounds against the exhaustive oracle, on small pipelines of very unlike
// groups, where the bounds beyond the problem format's matter most.

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <utility>

#include "search/problem/bound.h"
#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_validation.h"
#include "search/problem/ramp_bound.h"
#include "search/strategy/testing/oracle.h"
#include "search/strategy/testing/random_problem.h"

namespace pipeweaver::search {
namespace {

// Two or three sweeps over all ranks, one or two of them long and mostly in a
// chain; now and then with split backwards, or one that comes the other way.
Problem LongChainProblem(uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto below = [&random](int64_t bound) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(bound));
  };
  const auto chance = [&below](int percent) { return below(100) < percent; };
  Problem problem;
  problem.ranks = chance(60) ? 2 : 3;
  problem.memory_limit_bytes.assign(problem.ranks, 100);
  const bool uneven = chance(50), transfers = chance(50), frozen = chance(15);
  const bool backwards = chance(20);  // the last sweep comes the other way
  problem.split_backward = chance(15);
  const int sweeps = problem.ranks == 2 ? 3 : 2;
  const int longs = sweeps == 2 ? 1 : static_cast<int>(1 + below(2));
  for (int s = 0; s < sweeps; ++s) {
    Sweep sweep;
    sweep.id = std::to_string(s);
    const int64_t length = s < longs ? 4 + below(6) : 1 + below(3);
    const int64_t back = 1 + below(3);
    sweep.backward = !(frozen && s >= longs && chance(50));
    if (s > 0 && sweep.backward && chance(s < longs ? 80 : 30)) {
      sweep.after.push_back(s - 1);
    }
    for (int r = 0; r < problem.ranks; ++r) {
      Stage stage;
      stage.rank = backwards && s == sweeps - 1 ? problem.ranks - 1 - r : r;
      stage.transfer_ns = transfers ? below(4) : 0;
      for (int c = chance(30) ? 2 : 1; c > 0; --c) {
        Choice choice;
        choice.forward_ns = length + (uneven ? below(3) : 0);
        choice.input_grad_ns = back * length + (uneven ? below(3) : 0);
        choice.weight_grad_ns = problem.split_backward ? 1 + below(length) : 0;
        stage.choices.Mutable().push_back(std::move(choice));
      }
      sweep.stages.push_back(std::move(stage));
    }
    problem.sweeps.push_back(std::move(sweep));
  }
  return problem;
}

TEST(BoundOracleTest, NoScheduleIsBelowAnyBound) {
  uint64_t exact = 0, by_ramps = 0, met = 0;
  for (uint64_t seed = 1; seed <= FuzzProblems(); ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const Problem problem = LongChainProblem(seed);
    ASSERT_TRUE(ValidateProblem(problem).ok());
    const ProblemGraph graph = BuildProblemGraph(problem);
    const OracleAnswer oracle = SolveExhaustively(graph);
    if (!oracle.exact) continue;
    ++exact;
    ASSERT_TRUE(oracle.makespan_ns.has_value());
    const LowerBounds bounds = FindLowerBounds(graph);
    EXPECT_LE(bounds.path_ns, bounds.flow_ns);
    ASSERT_LE(bounds.flow_ns, *oracle.makespan_ns);
    const auto path_ns = static_cast<uint64_t>(bounds.path_ns);
    const uint64_t ramp_ns = RampLowerBound(graph, ComputePathBound(graph),
                                            RoutesOf(graph), path_ns);
    EXPECT_LE(ramp_ns, static_cast<uint64_t>(bounds.flow_ns));
    by_ramps += ramp_ns > path_ns ? 1 : 0;
    met += ramp_ns > path_ns &&
                   ramp_ns == static_cast<uint64_t>(*oracle.makespan_ns)
               ? 1
               : 0;
  }
  // Enough problems on which the ramps say more, and all there is to say.
  EXPECT_GT(exact, FuzzProblems() * 9 / 10);
  EXPECT_GT(by_ramps, FuzzProblems() / 20);
  EXPECT_GT(met, 0u);
  RecordProperty("by_ramps", std::to_string(by_ramps));
  RecordProperty("met", std::to_string(met));
}

}  // namespace
}  // namespace pipeweaver::search
