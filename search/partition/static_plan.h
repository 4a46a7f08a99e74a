// The best static partition and order for the mean batch, found offline by
// simulation and then kept, as nnScaler's users do (Lin et al., OSDI 2024).

#ifndef SEARCH_PARTITION_STATIC_PLAN_H_
#define SEARCH_PARTITION_STATIC_PLAN_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "search/partition/layer_chain.h"
#include "search/partition/memory_plan.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Chunks of a rank that interleaved baselines go up to.
inline constexpr int kMostVirtualStages = 4;

struct StaticPlan {
  Chain chain;
  MemoryPlan memory;
  // Of all layers.
  semu::MemoryStrategy strategy = semu::MemoryStrategy::kKeep;
  std::vector<std::vector<ChainTurn>> order;  // [rank]
  int64_t mean_batch_ns = 0;  // makespan when all microbatches are the mean one
};

// Plans for steps of `microbatches`, least makespan of the mean batch first.
// Chains of 1 to 4 virtual stages (at most executor.max_segments), cut by time
// and by memory, under every strategy of the executor, are ranked by their
// makespan in 1F1B order; for the best three an order is searched
// (portfolio.h, a fixed number of evaluations). The others follow as they are,
// for batches that the best do not fit. Deterministic.
//
// Errors: RESOURCE_EXHAUSTED naming rank, bytes and limit when the weights fit
// in no chain; INVALID_ARGUMENT when the mean batch breaks a rule of
// ValidateProblem (its sums); CANCELLED once `cancelled`, which may be null, is
// set; those of WeighChain and BuildStepProblem.
absl::StatusOr<std::vector<StaticPlan>> FindStaticPlans(
    const semu::Job& job, const semu::Batch& reference, int microbatches,
    const semu::CostModel& costs, const std::atomic<bool>* cancelled = nullptr);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_STATIC_PLAN_H_
