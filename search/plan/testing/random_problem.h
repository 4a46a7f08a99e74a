// Random scheduling problems and schedules for tests: random module graphs, V
// placement, skipped ranks, several segments, frozen modules, split and fused
// backwards, offload, zero durations.

#ifndef SEARCH_PLAN_TESTING_RANDOM_PROBLEM_H_
#define SEARCH_PLAN_TESTING_RANDOM_PROBLEM_H_

#include <cstdint>
#include <random>

#include "search/partition/step_problem.h"
#include "search/problem/problem.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search::testing {

// A number in [low, high]; equal on all platforms for equal generators.
int64_t Uniform(std::mt19937_64& random, int64_t low, int64_t high);

// A well-formed step problem without memory limits to speak of.
StepProblem RandomStepProblem(std::mt19937_64& random);

// A random complete order without deadlock, with random choices; memory is
// ignored.
Schedule RandomSchedule(const Problem& problem, std::mt19937_64& random);

}  // namespace pipeweaver::search::testing

#endif  // SEARCH_PLAN_TESTING_RANDOM_PROBLEM_H_
