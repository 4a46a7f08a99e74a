// Sums over the chunks of each rank.

#include "search/partition/memory_plan.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "search/partition/stage_cost.h"
#include "semu/cost/layer_bytes.h"
#include "semu/cost/weight_memory.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {

LayerReserve::LayerReserve(const semu::Job& job)
    : platform_(semu::PlatformOf(job)),
      rebuilds_(job.executor.selective_recompute ||
                job.executor.full_recompute || job.executor.offload),
      forward_bytes_(job.parallelism.pipeline_parallel, 0),
      gathered_bytes_(job.parallelism.pipeline_parallel, 0) {}

void LayerReserve::Add(int rank, const semu::LayerQuery& query,
                       const semu::LayerCost& cost) {
  if (rebuilds_ && query.input_grad) {
    forward_bytes_[rank] = std::max(forward_bytes_[rank], cost.forward_bytes);
  }
  gathered_bytes_[rank] =
      std::max(gathered_bytes_[rank], semu::GatheredBytes(platform_, query));
}

absl::StatusOr<MemoryPlan> PlanMemory(const semu::Job& job,
                                      const semu::Layout& layout,
                                      const semu::CostModel& costs) {
  const int ranks = job.parallelism.pipeline_parallel;
  const semu::Platform platform = semu::PlatformOf(job);
  const semu::ModuleGradients gradients = semu::RequiredGradients(job);
  std::vector<int64_t> weights(ranks, 0);
  LayerReserve layers(job);
  int64_t largest_transfer = 0;
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const semu::Module& module = job.modules[m];
    const int64_t tokens = std::min(2 * layout.modules[m].sub_microbatch_tokens,
                                    job.max_microbatch_tokens[m]);
    semu::LayerQuery query;
    query.shape = {1, tokens, tokens * tokens, tokens, 0, 0};
    query.weight_grad = !module.frozen;
    query.input_grad = gradients.Backward(static_cast<int>(m));
    std::vector<semu::LayerCost> layer_costs;
    std::vector<int64_t> weight_bytes;
    for (const semu::LayerGroup& group : module.layers) {
      query.layer = group.layer;
      layer_costs.push_back(costs.Cost(platform, query));
      weight_bytes.push_back(
          semu::WeightMemoryOf(job, group.layer, !module.frozen).Total());
      largest_transfer =
          std::max(largest_transfer, layer_costs.back().output_bytes);
    }
    for (const semu::PipelineSegment& segment : layout.modules[m].segments) {
      for (const semu::Chunk& chunk : segment.chunks) {
        for (const LayerRun& run : RunsOf(module, chunk)) {
          weights[chunk.rank] += run.count * weight_bytes[run.group];
          query.layer = module.layers[run.group].layer;
          layers.Add(chunk.rank, query, layer_costs[run.group]);
        }
      }
    }
  }

  MemoryPlan plan;
  if (ranks > 1) {
    plan.transfer_bytes =
        (job.executor.max_receives_ahead + kSendsInFlightPerRank * ranks) *
        largest_transfer;
  }
  for (int r = 0; r < ranks; ++r) {
    const int64_t reserve = plan.transfer_bytes + layers.bytes(r);
    const int64_t used = weights[r] + reserve;
    if (used >= job.memory_budget_bytes) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "rank ", r, " needs ", weights[r],
          " bytes for weights, gradients and optimizer states and ", reserve,
          " in reserve: the limit is memory_budget_bytes = ",
          job.memory_budget_bytes));
    }
    plan.static_bytes.push_back(used);
    plan.layer_reserve_bytes.push_back(layers.bytes(r));
    plan.activation_limit_bytes.push_back(job.memory_budget_bytes - used);
  }
  return plan;
}

}  // namespace pipeweaver::search
