// Baselines that a trainer without a planner runs,
// planned on the same costs, dependencies, transfers and memory: a layout in
// which the modules stand one behind the other as one chain, and a static
// order.

#ifndef SEARCH_PARTITION_BASELINES_H_
#define SEARCH_PARTITION_BASELINES_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem.h"
#include "search/problem/schedule.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

enum class Baseline {
  // "megatron": chunks of about equal parameters, interleaved 1F1B.
  kMegatron,
  // "1f1b": chunks of least largest time for the mean microbatch, 1F1B.
  k1f1b,
  // "interleaved-1f1b": the same chunks' rule, interleaved 1F1B.
  kInterleaved1f1b,
};

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
// Backwards are not split. One memory strategy holds for all layers: the
// fastest of keep, selective and full recompute, of those that the executor can
// run, that fits along the order. Interleaved baselines take the best of 1 to 4
// virtual stages (at most executor.max_segments, and one layer a chunk) for the
// batch at hand, which favours them.
//
// `reference` is the batch whose mean the layers are divided for.
//
// Errors: RESOURCE_EXHAUSTED naming rank, bytes and limit when nothing fits;
// FAILED_PRECONDITION when there are fewer layers than ranks, or more than 2^20
// microbatches times ranks; those of BuildStepProblem.
absl::StatusOr<BaselinePlan> PlanBaseline(Baseline baseline,
                                          const semu::Job& job,
                                          const semu::Batch& reference,
                                          const semu::Batch& batch,
                                          const semu::CostModel& costs);

// Modules one behind the other.
struct Chain {
  semu::Layout layout;
  // [module][segment]: which pass over the ranks the segment is part of.
  std::vector<std::vector<int>> virtual_stage;
};

// Cuts the layers of the modules in topological order into chunks of even
// weight; chunk c of ranks * virtual_stages stands on rank c mod ranks.
// REQUIRES: as many `layer_weights` as the job has layers, in that order.
Chain MakeChain(const semu::Job& job, const std::vector<int64_t>& layer_weights,
                int virtual_stages);

// One turn of a rank's static order: forward or backward of a microbatch
// through the rank's chunk of a virtual stage.
struct ChainTurn {
  bool forward = true;
  int microbatch = 0;
  int virtual_stage = 0;
};

// Megatron-LM's order of a rank: 1F1B where virtual_stages is 1, else
// interleaved in groups of `ranks` microbatches (Narayanan et al., arXiv
// 2104.04473), the last group filled up with microbatches >= `microbatches`
// that are to be skipped. Leaving turns out keeps an order free of deadlock.
std::vector<ChainTurn> ChainOrder(int ranks, int rank, int microbatches,
                                  int virtual_stages);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_BASELINES_H_
