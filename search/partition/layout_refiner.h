// Betters a layout by simulated makespan on sample batches: segment counts,
// directions of sweeps, and sub-microbatch sizes.

#ifndef SEARCH_PARTITION_LAYOUT_REFINER_H_
#define SEARCH_PARTITION_LAYOUT_REFINER_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "search/partition/layout_planner.h"
#include "search/partition/step_problem.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Makespan, in nanoseconds, of a good schedule of the problem; an error when it
// has none. Must be deterministic for the refinement to be so, and is called on
// several threads at once.
using StepEvaluator =
    std::function<absl::StatusOr<int64_t>(const StepProblem&)>;

struct RefineOptions {
  // Whether steps can be run on a layout at all, beside its memory plan; what
  // fails is not looked at. Null: they can. Called on several threads at once.
  std::function<absl::Status(const semu::Layout&)> fits = nullptr;
  // Asked now and then, on several threads at once; true ends the refinement
  // with CANCELLED. Null: never.
  std::function<bool()> cancelled = nullptr;
  // Most layouts evaluated. A layout that is clearly worse than the best so far
  // on the first samples is not evaluated on the others.
  int max_layouts = 150;
  // Of the problems of samples evaluated, summed up: once so many were, no
  // further layout is looked at; what bounds the time. Up to eight are
  // evaluated at a time, and the first two always.
  int64_t max_stages = 1'000'000;
  // Of the least makespan: a layout that takes no more counts as good as the
  // best. At least 1. The higher, the fewer stages, and the longer may steps be
  // by prediction.
  double no_worse = 1.002;
  // Of the paper's makespan on the held-out batches: a refined layout that
  // takes more does not replace the paper's.
  double convincing = 0.98;
  // That evaluate layouts; without influence on the result. At least 1.
  int threads = 1;
};

// `status`, that of a sample batch, with the batch's number in its message.
absl::Status OfSample(size_t number, const absl::Status& status);

struct RefinedLayout {
  LayoutShape shape;
  semu::Layout layout;
  // Sum of makespans over the samples: of the paper's rule, of `layout`. The
  // former is -1 where the paper's layout does not fit.
  int64_t paper_ns = -1;
  int64_t refined_ns = 0;
  // `layout` is the paper's: nothing better was found, or not by the held-out
  // batches, or nothing as good has as few stages.
  bool is_paper = false;
  int layouts_evaluated = 0;
};

// Starts from the better of PaperLayoutShape and the shape with whole
// microbatches and one segment a module, and changes one module at a time,
// heaviest first: of its other sub-microbatch sizes (half, one and a half,
// double, four times, whole) and its other segment counts together with
// directions (up, down, and the two alternations, within the executor's
// capabilities), the best, as long as the sum of makespans falls by 0.1 %.
// Modules with under 2 % of the arithmetic time stay as they are. Of the
// layouts seen that are as good as the best (no_worse), the one with fewest
// stages is refined: its steps are planned sooner and its search gets further
// in the same time. For that reason, too, layouts are left out by which a
// sample has more than 12,000 stage pairs and more than by the paper's, where
// that fits. What was found, or else the best layout, replaces the paper's only
// if the held-out batches agree.
//
// `samples` and `held_out` are not empty; layers are placed for the mean of the
// samples. Errors: of the last layout tried, when none fits; of a batch, named
// "sample batch I", held-out ones counted last, mostly RESOURCE_EXHAUSTED;
// those of MeanLayerTimes; CANCELLED.
absl::StatusOr<RefinedLayout> RefineLayout(
    const semu::Job& job, const semu::CostModel& costs,
    absl::Span<const semu::Batch> samples,
    absl::Span<const semu::Batch> held_out, const StepEvaluator& evaluator,
    const RefineOptions& options = {});

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_LAYOUT_REFINER_H_
