// Small random scheduling problems of every shape, for tests.

#ifndef SEARCH_STRATEGY_TESTING_RANDOM_PROBLEM_H_
#define SEARCH_STRATEGY_TESTING_RANDOM_PROBLEM_H_

#include <cstdint>

#include "search/problem/problem.h"

namespace pipeweaver::search {

struct RandomProblemOptions {
  int most_pairs = 4;
  int most_ranks = 3;
  int most_choices = 3;
};

// A well-formed problem that depends on `seed` alone. All shapes come up: DAGs
// of sweeps, segments back and forth and across the same rank again, split and
// whole backwards, fused backwards cheaper and dearer, sweeps without a
// backward, zero durations and transfers, limits of zero, tight, loose.
Problem RandomProblem(uint64_t seed, const RandomProblemOptions& options = {});

// How many random problems a test is to try: $PIPEWEAVER_FUZZ_PROBLEMS, 400 by
// default.
uint64_t FuzzProblems();

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_TESTING_RANDOM_PROBLEM_H_
