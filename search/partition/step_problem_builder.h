// From a job, a layout and a step's batch to the scheduling problem.

#ifndef SEARCH_PARTITION_STEP_PROBLEM_BUILDER_H_
#define SEARCH_PARTITION_STEP_PROBLEM_BUILDER_H_

#include <cstdint>
#include <optional>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "search/partition/step_problem.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

class WorkerPool;

struct StepProblemOptions {
  // Most memory choices offered a stage, >= 2.
  int max_choices = 10;
  // Set: every layer runs under this strategy, and each stage has one choice.
  std::optional<semu::MemoryStrategy> strategy = std::nullopt;
  // A choice puts all layers of a chunk under one strategy: few choices, which
  // no time has a say in. max_choices is not looked at.
  bool uniform_choices = false;
  // Choices may offload, where the executor can do it.
  bool offload = true;
  // Input and weight gradients may be apart, where the executor can do it.
  bool split_backward = true;
  // [rank], MemoryPlan::layer_reserve_bytes; empty: layers need no more than
  // was reserved. Not owned.
  absl::Span<const int64_t> layer_reserve_bytes = {};
  // Threads that share the work, which changes no result; null: the caller's.
  WorkerPool* pool = nullptr;
};

// Splits `batch` (batch_split.h), costs every stage and joins the sweeps as the
// items' uses say: a sweep of a module's first segment
// runs after the last segments of the producers' sub-microbatches that hold an
// item it consumes, a later segment after the one before it.
//
// Backward: none in a forward-only batch, nor in a frozen module that nothing
// trainable stands upstream of; no weight gradient in any other frozen module.
// Choices: the same for all sub-microbatches of a chunk, found for the one with
// the most tokens; a single one that keeps everything where the rank's limit
// holds all its stages at once.
// Transfers: a stage's output reaches the slowest of the ranks that want it;
// what crosses an edge is each consumed item's merged tokens, once a consumer.
//
// REQUIRES: job, layout and batch are validated and fit each other; one memory
// limit a rank.
// Errors: INVALID_ARGUMENT when an item is larger than every shape bucket, when
// the step has more than 2^20 stages, or when its times or sizes pass 2^62.
absl::StatusOr<StepProblem> BuildStepProblem(
    const semu::Job& job, const semu::Layout& layout,
    absl::Span<const int64_t> memory_limit_bytes, const semu::Batch& batch,
    const semu::CostModel& costs, const StepProblemOptions& options = {});

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_STEP_PROBLEM_BUILDER_H_
