// Proposes a layout: the paper's rule (METHOD.md section 3).

#ifndef SEARCH_PARTITION_LAYOUT_PLANNER_H_
#define SEARCH_PARTITION_LAYOUT_PLANNER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "semu/cost/cost_model.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// B_m of a module: the fewest tokens, in whole items of a usual length, at
// which time a token is at most 1/0.95 of its least over sizes up to the
// module's longest microbatch; within the largest shape bucket. A usual item: a
// 728 px square of images, 4 s of audio, a 2 s clip at 16 FPS, 1024 tokens of
// text.
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
// ranks; at most executor.max_segments and the number of layers over ranks;
// ascending.
LayoutShape PaperLayoutShape(const semu::Job& job,
                             const semu::CostModel& costs);

// Places the layers of every module on the chunks of `shape` by time,
// embeddings and heads counting where they stand. A module with fewer layers
// than ranks has one segment over as many ranks as it has layers: the last
// ranks, where its producer's output is made, or the first ones if it has none.
semu::Layout PlaceLayers(const semu::Job& job, const LayoutShape& shape,
                         const semu::CostModel& costs);

// PlaceLayers of PaperLayoutShape.
semu::Layout PlanLayout(const semu::Job& job, const semu::CostModel& costs);

// Forward and backward time of each of a module's layers at `shape`.
std::vector<int64_t> LayerTimesNs(const semu::Job& job, int module,
                                  const semu::Shape& shape,
                                  const semu::CostModel& costs);

// `tokens` in items of the module's usual length.
semu::Shape UsualShape(const semu::Job& job, int module, int64_t tokens);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_LAYOUT_PLANNER_H_
