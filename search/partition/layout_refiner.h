// Betters a layout by simulated makespan on sample batches: segment counts,
// directions of sweeps, and sub-microbatch sizes.

#ifndef SEARCH_PARTITION_LAYOUT_REFINER_H_
#define SEARCH_PARTITION_LAYOUT_REFINER_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "search/partition/layout_planner.h"
#include "search/partition/step_problem.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Makespan, in nanoseconds, of a good schedule of the problem; an error when it
// has none. Must be deterministic for the refinement to be so.
using StepEvaluator =
    std::function<absl::StatusOr<int64_t>(const StepProblem&)>;

struct RefineOptions {
  // Most layouts evaluated. A layout that is clearly worse than the best so far
  // on the first sample is not evaluated on the others.
  int max_layouts = 100;
  // Most stages in the problems evaluated, summed up; what bounds the time. The
  // paper's layout is always evaluated.
  int64_t max_stages = 1'000'000;
};

struct RefinedLayout {
  LayoutShape shape;
  semu::Layout layout;
  // Sum of makespans over the samples: of the paper's rule, of the best layout
  // found. The former is -1 where the paper's layout does not fit.
  int64_t paper_ns = -1;
  int64_t refined_ns = 0;
  // `layout` is the paper's: nothing better was found, or not by the held-out
  // batch.
  bool is_paper = false;
  int layouts_evaluated = 0;
};

// Starts from PaperLayoutShape and from the shape with whole microbatches and
// one segment a module, and changes one module at a time, heaviest first: its
// segment count together with directions (up, down, and the two alternations,
// within the executor's capabilities), then its sub-microbatch size (halved,
// doubled, quadrupled, whole), as long as the sum of makespans falls by 0.1 %.
// Modules with under 2 % of the arithmetic time stay as they are. What was
// found replaces the paper's layout only if it is better by 2 % on `held_out`,
// too.
//
// `samples` are not empty; layers are placed for their mean. Errors:
// RESOURCE_EXHAUSTED, of the last layout tried, when none fits.
absl::StatusOr<RefinedLayout> RefineLayout(
    const semu::Job& job, const semu::CostModel& costs,
    absl::Span<const semu::Batch> samples, const semu::Batch& held_out,
    const StepEvaluator& evaluator, const RefineOptions& options = {});

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_LAYOUT_REFINER_H_
