// Whether a problem can be scheduled within memory at all, and a plan that any
// scheduler can fall back on: components of sweeps one after another.
//
// Terms. Sweeps without a backward hold memory only while they run; leave them
// out. The rest fall into components connected by `after`. A component holds
// nothing before its first F and nothing after its last backward, so:
//
// * A problem fits exactly when each component fits by itself (drop everything
//   else from a schedule and memory only falls) and each F of the sweeps
//   without a backward fits by itself.
// * Within a component, W may run right after its I: it waits for nothing
//   else, and its bytes are held at I's end anyway. So a backward is one step
//   whose peak is max(backward, weight gradient) bytes for I with W, or the
//   bytes of B, and which gives the activation back. A backward that is ready
//   and fits may run at once: after it every rank holds no more than before.
// * A component with a single sink has all its F before its first backward
//   (every sweep leads to the sink, whose last F precedes its first backward).
//   So with given choices it fits exactly when on every rank the sum of
//   activations fits and running whatever backward is ready and fits never
//   gets stuck. Which choices: the least activations where the order of
//   backwards on each rank is given, found from the last backward to the first;
//   else branch and bound over the choices.
// * Other components: depth-first search over F steps and choices with a memory
//   of states, exact unless it runs out of work.
// * What little of either search does not solve is tried by some hundred random
//   descents, the same in every call, before the rest of the search: orders of
//   backwards for a single sink, else orders of F and choices.
// * A sink together with all that it waits for is a component with a single
//   sink. Where it does not fit though each pair counts with the least of its
//   bytes and one rank alone has a limit, that rank is why no schedule exists.

#ifndef SEARCH_STRATEGY_SAFE_PLAN_H_
#define SEARCH_STRATEGY_SAFE_PLAN_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/strategy.h"

namespace pipeweaver::search {

// A step of a component by itself: F of a pair, or its whole backward (B, or I
// with W right after it).
struct SafeStep {
  int32_t pair = 0;
  bool backward = false;
};

struct SafeComponent {
  std::vector<int32_t> sweeps;
  // Every F and every backward, in an order that fits.
  std::vector<SafeStep> steps;
  // All F come before all backwards in `steps`. Then any order of F fits, and
  // any order of the backwards of which each rank's part follows `steps`.
  bool forwards_first = true;
};

struct SafePlan {
  std::vector<SafeComponent> components;
  std::vector<int32_t> component_of_sweep;  // -1: without a backward
  std::vector<int32_t> choice;              // [pair]
  std::vector<uint8_t> fused;               // [pair]: kSplit runs as B
};

// The peak of a backward step above nothing, for a choice and way to run it.
int64_t BackwardStepBytes(const GraphChoice& choice, PairMode mode, bool fused);

// Work that searches for a plan spend at most, in pair steps: some seconds.
inline constexpr int64_t kMostSafePlanWork = 50'000'000;

// `most_work`: of searches, where what is easily found does not fit. Without
// `budget.deadline` and `budget.cancelled` the result depends on the problem
// and on that alone. Past the deadline, what is easily found still is, and a
// search ends within a fraction of a second; once cancelled, at once.
//
// Errors: RESOURCE_EXHAUSTED when a component does not fit; the message names
// rank, bytes and limit and says whether no schedule exists or none was found,
// and whether the bytes are those of every order or of one tried. Its field
// (field_error.h) is the rank's limit.
absl::StatusOr<SafePlan> FindSafePlan(const ProblemGraph& graph,
                                      const SearchBudget& budget = {},
                                      int64_t most_work = kMostSafePlanWork);

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_SAFE_PLAN_H_
