// Proposes a layout: the paper's rule, with layers placed
// so that ranks, not only chunks, have even work.

#ifndef SEARCH_PARTITION_LAYOUT_PLANNER_H_
#define SEARCH_PARTITION_LAYOUT_PLANNER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Share of the work below which a module counts for little.
inline constexpr double kLightModule = 0.02;

// B_m of a module: the fewest tokens, in whole usual items (usual_batch.h), at
// which time a token is at most 1/0.95 of its least over sizes up to the
// module's longest microbatch; within the largest shape bucket.
int64_t EfficientTokens(const semu::Job& job, int module,
                        const semu::CostModel& costs);

// What a layout is made from; the refinement varies it.
struct LayoutShape {
  struct ModuleShape {
    int64_t sub_microbatch_tokens = 0;
    int segments = 1;
    // [segment]: it runs from the last rank back to the first.
    std::vector<bool> descending;
  };
  std::vector<ModuleShape> modules;
};

// The paper's rule: B_m as above, and K_m = floor(T_m / T_min), T_m being the
// module's time at B_m and T_min the least among modules that can fill all
// ranks and have at least 2 % of the work of UsualBatch (the paper has two
// modules; a third, tiny one would cut all others to pieces); at most
// executor.max_segments and the number of layers over ranks; ascending. Errors:
// those of MeanLayerTimes for UsualBatch.
absl::StatusOr<LayoutShape> PaperLayoutShape(const semu::Job& job,
                                             const semu::CostModel& costs);

// Forward and backward time of every layer, in nanoseconds: [module][layer].
using LayerTimes = std::vector<std::vector<int64_t>>;

// Those in the mean microbatch of a batch. Errors: INVALID_ARGUMENT when they
// sum up to more than kMostWeightSum (layer_partition.h).
absl::StatusOr<LayerTimes> MeanLayerTimes(const semu::Job& job,
                                          const semu::Batch& batch,
                                          const semu::CostModel& costs);

// Places the layers of every module on the chunks of `shape`: the largest chunk
// of each module takes least time (layer_partition.h), embeddings and heads
// counting where they stand; then single layers move from the busiest rank to
// others while that lowers the work of the busiest rank, or evens the rest out,
// and no chunk grows by more than one layer's time over the largest. A module
// with fewer layers than ranks has one segment over as many ranks as it has
// layers: the last ranks, where its producer's output is made, or the first
// ones if it has none. REQUIRES: the times sum up to at most kMostWeightSum.
semu::Layout PlaceLayers(const semu::Job& job, const LayoutShape& shape,
                         const LayerTimes& times);

// PlaceLayers of PaperLayoutShape for UsualBatch. Errors: those of
// MeanLayerTimes for UsualBatch.
absl::StatusOr<semu::Layout> PlanLayout(const semu::Job& job,
                                        const semu::CostModel& costs);

// Forward and backward time of each of a module's layers at `shape`.
std::vector<int64_t> LayerTimesNs(const semu::Job& job, int module,
                                  const semu::Shape& shape,
                                  const semu::CostModel& costs);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_LAYOUT_PLANNER_H_
