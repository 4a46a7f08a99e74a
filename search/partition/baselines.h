// Baselines that a trainer without a planner runs, planned on the same costs,
// dependencies, transfers and memory: a static layout and a static order.

#ifndef SEARCH_PARTITION_BASELINES_H_
#define SEARCH_PARTITION_BASELINES_H_

#include <atomic>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "search/partition/memory_plan.h"
#include "search/partition/static_plan.h"
#include "search/partition/step_problem.h"
#include "search/problem/schedule.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// "By time" below: chunks of least largest time for the mean microbatch. A star
// marks our reading of another system's idea on our costs, not that system.
enum class Baseline {
  // "megatron": all modules as one chain, chunks of about equal parameters,
  // interleaved 1F1B.
  kMegatron,
  // "1f1b": the chain by time, 1F1B.
  k1f1b,
  // "interleaved-1f1b": the chain by time, interleaved 1F1B.
  kInterleaved1f1b,
  // "nnscaler*": the best static chain and order for the mean batch
  // (static_plan.h).
  kNnScaler,
  // "optimus*": the backbone by time in interleaved 1F1B; each encoder spread
  // over all ranks by time, its stages in the backbone's bubbles
  // (bubble_filler.h). The backbone is the module that no other consumes.
  kOptimus,
  // "nested": every module spread over all ranks by time; encoder stages of a
  // microbatch just ahead of and behind its backbone stages
  // (search/plan/safe_order.h), as in BigMac (arXiv 2605.25451).
  kNested,
  // "gpipe": the chain by time, all forwards before all backwards.
  kGpipe,
  // "zb-h1", "zb-v": the chain by time, weight gradients apart (layer_chain.h).
  kZbH1,
  kZbV,
};

// All of them, in the order of reports.
absl::Span<const Baseline> AllBaselines();
absl::string_view BaselineName(Baseline baseline);
std::optional<Baseline> BaselineFromName(absl::string_view name);

struct BaselinePlan {
  semu::Layout layout;
  MemoryPlan memory;
  StepProblem step;
  Schedule schedule;
  StageTimes times;
  int virtual_stages = 1;
  semu::MemoryStrategy strategy = semu::MemoryStrategy::kKeep;
};

// Plans `batch` as `baseline` would run it. Microbatches pass whole through all
// chunks in order; a microbatch without items of a module skips its layers.
// Backwards are split in zb-h1 and zb-v only. One memory strategy holds for all
// layers: the fastest of keep, selective and full recompute, of those that the
// executor can run, that fits along the order; for nested, whose order depends
// on memory, that of the least makespan. Memory is accounted for as in plans,
// but for what reports told of the job's own layout. Interleaved baselines take
// the best of 1 to 4 virtual stages (at most executor.max_segments, and one
// layer a chunk), and optimus* the best rule for its bubbles, for the batch at
// hand, which favours them.
//
// `reference` is the batch whose mean the layers are divided for.
//
// Errors: RESOURCE_EXHAUSTED naming rank, bytes and limit when nothing fits;
// FAILED_PRECONDITION when the baseline does not apply: there are fewer layers
// than ranks, or more than 2^20 microbatches times ranks, those that fill an
// order up (layer_chain.h) included; for zb-h1 and zb-v, the executor cannot
// split backwards; for zb-v, it has no V placement, one segment, or one layer a
// rank; for optimus*, several modules are consumed by none, or the one that is
// not has fewer layers than ranks; CANCELLED once `cancelled`, which may be
// null, is set; those of WeighChain, FindStaticPlans and BuildStepProblem.
absl::StatusOr<BaselinePlan> PlanBaseline(
    Baseline baseline, const semu::Job& job, const semu::Batch& reference,
    const semu::Batch& batch, const semu::CostModel& costs,
    const std::atomic<bool>* cancelled = nullptr);

// The first of `plans` that fits along the order of `batch`: nnscaler* whose
// plans are at hand. REQUIRES: plans were found for as many microbatches.
absl::StatusOr<BaselinePlan> PlanStatically(absl::Span<const StaticPlan> plans,
                                            const semu::Job& job,
                                            const semu::Batch& batch,
                                            const semu::CostModel& costs);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_BASELINES_H_
