// The part of a job that costs depend on.

#include "semu/cost/cost_model.h"

namespace pipeweaver::semu {

Platform PlatformOf(const Job& job) {
  return {job.parallelism, job.data_type, job.device, job.links};
}

std::vector<LayerCost> CostModel::CostAll(
    const Platform& platform, absl::Span<const LayerQuery> queries) const {
  std::vector<LayerCost> costs;
  costs.reserve(queries.size());
  for (const LayerQuery& query : queries) {
    costs.push_back(Cost(platform, query));
  }
  return costs;
}

}  // namespace pipeweaver::semu
