// Cost of a chunk's stages: layers' costs put together under a memory choice,
// and the few choices worth offering to the search.

#ifndef SEARCH_PARTITION_STAGE_COST_H_
#define SEARCH_PARTITION_STAGE_COST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/types/span.h"
#include "search/partition/step_problem.h"
#include "search/problem/problem.h"
#include "semu/cost/cost_model.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Consecutive equal layers of a chunk.
struct LayerRun {
  int group = 0;  // index into Module::layers
  int count = 0;

  auto operator<=>(const LayerRun&) const = default;
};

// The runs of a chunk. REQUIRES: the chunk lies within the module.
std::vector<LayerRun> RunsOf(const semu::Module& module,
                             const semu::Chunk& chunk);

// Equal layers of a chunk under one strategy.
struct LayerPiece {
  int group = 0;  // index into Module::layers
  semu::MemoryStrategy strategy = semu::MemoryStrategy::kKeep;
  int64_t count = 0;
};

using LayerPieces = absl::InlinedVector<LayerPiece, 8>;

// A chunk's layers under `choice`, in their order. REQUIRES: `choice` is for as
// many layers.
LayerPieces PiecesOf(absl::Span<const LayerRun> runs,
                     const MemoryChoice& choice);

// What a stage's executor and sweep allow.
struct StageMode {
  bool backward = true;
  // The problem allows the split of this stage's backward: only then is
  // fused_backward_ns set; else backward_bytes are those of the backward in
  // one.
  bool split_backward = false;
};

// The cost of the stage that `pieces` make up. `costs` has the cost of one
// layer of each of the module's groups.
//
// Memory: layers are gone through backward; one is rebuilt at a time. In an
// input gradient alone, what the weight gradient reads stays, so that rebuilt
// activations add up; in a backward in one piece they do not. Copies to and
// from the host run beside the stage itself, which takes at least as long as
// they do; when a backward begins, all that was copied is back. Without a
// backward, activation_bytes is what the forward needs at most.
Choice StageChoice(absl::Span<const LayerPiece> pieces,
                   absl::Span<const semu::LayerCost> costs,
                   const StageMode& mode);

// The same, written to `choice`, which is as it was made.
void SetStageChoice(absl::Span<const LayerPiece> pieces,
                    absl::Span<const semu::LayerCost> costs,
                    const StageMode& mode, Choice* choice);

// Up to `most` ways to run a chunk, fastest first: the fastest, the leanest,
// and the fastest in each of most - 2 equal bands of memory between, found over
// all counts of layers by strategy that the executor can run; in a chunk of
// more than 32 layers over counts by steps. REQUIRES: most >= 2.
std::vector<MemoryChoice> CandidateChoices(
    absl::Span<const LayerRun> runs, absl::Span<const semu::LayerCost> costs,
    const semu::ExecutorCapabilities& executor, int most);

// All layers of a chunk under one strategy.
MemoryChoice UniformChoice(absl::Span<const LayerRun> runs,
                           semu::MemoryStrategy strategy);

// One such choice for each way that the executor has to keep or recompute.
std::vector<MemoryChoice> UniformChoices(
    absl::Span<const LayerRun> runs,
    const semu::ExecutorCapabilities& executor);

// Copied to the host and back, per GPU.
int64_t OffloadBytes(absl::Span<const LayerPiece> pieces,
                     absl::Span<const semu::LayerCost> costs);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_STAGE_COST_H_
