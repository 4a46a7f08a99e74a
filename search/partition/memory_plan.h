// What each rank's memory is set aside for before any batch: weights,
// gradients, optimizer states and a reserve. What is left is for activations.

#ifndef SEARCH_PARTITION_MEMORY_PLAN_H_
#define SEARCH_PARTITION_MEMORY_PLAN_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "semu/cost/cost_model.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

struct MemoryPlan {
  // [rank], bytes per GPU.
  std::vector<int64_t> static_bytes;  // weights and reserve
  std::vector<int64_t> activation_limit_bytes;
  // Of the reserve, what is for the buffers of transfers; on every rank.
  int64_t transfer_bytes = 0;
  // Of the reserve, what is for the layer that runs; LayerReserve.
  std::vector<int64_t> layer_reserve_bytes;
};

// Bytes per GPU that a rank needs beside activations while one of its layers
// runs: where activations can be rebuilt or offloaded, what the hungriest
// single layer's forward needs; and the largest operand that a matmul gathers
// from the tensor-parallel GPUs.
class LayerReserve {
 public:
  explicit LayerReserve(const semu::Job& job);

  // Counts layers that the rank runs at `query`'s shape; `cost` is that of
  // `query`.
  void Add(int rank, const semu::LayerQuery& query,
           const semu::LayerCost& cost);

  int64_t bytes(int rank) const {
    return forward_bytes_[rank] + gathered_bytes_[rank];
  }

 private:
  const semu::Platform platform_;
  const bool rebuilds_;
  std::vector<int64_t> forward_bytes_, gathered_bytes_;  // [rank]
};

// Values that a rank has made and its neighbours have not yet taken, as many
// as schedules of set-ups were seen to keep; where a schedule keeps more, the
// planner gives it less memory for activations and searches again.
inline constexpr int kSendsInFlightPerRank = 4;

// Accounts for a layout. The reserve of a rank is buffers for
// executor.max_receives_ahead receives and kSendsInFlightPerRank * ranks sends
// of the largest transfer, and its LayerReserve. All are for a sub-microbatch
// of twice B_m tokens (near-equal parts of whole items stay below, unless one
// item alone is longer: a step with such items has the more set aside,
// StepProblem::extra_reserve_bytes) or of the module's longest microbatch, if
// that is less. CUDA's context and fragmentation are outside the job's budget.
//
// Errors: RESOURCE_EXHAUSTED, naming rank, bytes and limit, when a rank's
// static bytes leave nothing of memory_budget_bytes.
absl::StatusOr<MemoryPlan> PlanMemory(const semu::Job& job,
                                      const semu::Layout& layout,
                                      const semu::CostModel& costs);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_MEMORY_PLAN_H_
