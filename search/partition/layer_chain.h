// Modules one behind the other as one chain of layers, cut into chunks, and the
// static orders in which ranks run them.

#ifndef SEARCH_PARTITION_LAYER_CHAIN_H_
#define SEARCH_PARTITION_LAYER_CHAIN_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "search/partition/step_problem.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// What the layers of a chain are divided by; one entry a layer, modules in
// topological order.
struct ChainWeights {
  std::vector<int64_t> parameters;
  // Of weights with gradients and optimizer states, per GPU.
  std::vector<int64_t> bytes;
  // Forward and backward in the mean microbatch.
  std::vector<int64_t> time_ns;
};
// `modules` is in topological order. Errors: those of MeanLayerTimes.
absl::StatusOr<ChainWeights> WeighChain(const semu::Job& job,
                                        absl::Span<const int> modules,
                                        const semu::Batch& reference,
                                        const semu::CostModel& costs);

// Lengths of chunks of least largest time, `chunks_per_rank` on each rank: as
// they come, then, where that is another cut, such that no rank's weights take
// more than a share of `memory_bytes`, for smaller and smaller shares.
std::vector<std::vector<int>> CutsByTime(const ChainWeights& weights, int ranks,
                                         int chunks_per_rank,
                                         int64_t memory_bytes);

// Strategies that the executor can run for all layers alike, fastest first.
std::vector<semu::MemoryStrategy> UniformStrategies(const semu::Job& job);

// Where a chain's chunks stand. Chunk c is pass c / ranks over the ranks.
struct Chain {
  semu::Layout layout;
  // [module][segment]: which pass over the ranks the segment is part of, or -1
  // for modules that the chain leaves out.
  std::vector<std::vector<int>> virtual_stage;
  int virtual_stages = 1;
};

// Cuts the layers of `modules` into chunks of these lengths. Every pass goes up
// the ranks; with `v_shaped`, every second one goes down. Microbatches pass
// whole. Other modules are left without segments.
// REQUIRES: a multiple of ranks many lengths, which sum up to the layers.
Chain MakeChain(const semu::Job& job, absl::Span<const int> modules,
                absl::Span<const int> chunk_lengths, bool v_shaped);

// One turn of a rank's static order: one direction of a microbatch through the
// rank's chunk of a virtual stage. kInputGrad and kWeightGrad stand for
// kBackward and nothing where a stage does not split.
struct ChainTurn {
  StageKind kind = StageKind::kForward;
  int microbatch = 0;
  int virtual_stage = 0;
};

enum class ChainRule {
  // 1F1B where there is one virtual stage, else interleaved in groups of
  // `ranks` microbatches (Narayanan et al., arXiv 2104.04473), the last group
  // filled up.
  k1f1b,
  // All forwards, then all backwards. One virtual stage.
  kGpipe,
  // 1F1B whose rank r runs weight gradients r microbatches late, so that it
  // holds as much as 1F1B's first rank (ZB-H1; Qi et al., arXiv 2401.10241).
  // One virtual stage.
  kZeroBubbleH1,
  // The closed form over a V of two virtual stages (ZB-V; Qi et al., arXiv
  // 2405.15362), filled up to 2 * ranks - 1 microbatches.
  kZeroBubbleV,
};

// How many microbatches an order is made for: `microbatches`, and those that
// fill it up.
int FilledMicrobatches(ChainRule rule, int ranks, int microbatches,
                       int virtual_stages);

// A rank's order. Microbatches that fill it up are left out in the end, which
// keeps it free of deadlock; they cost time alone.
std::vector<ChainTurn> ChainOrder(ChainRule rule, int ranks, int rank,
                                  int microbatches, int virtual_stages);

// The schedule of the ranks' orders ([rank]); modules outside the chain have no
// part in it. `graph` is that of `step`, which was built for the chain's
// layout and has one choice a stage.
Schedule ChainSchedule(const semu::Job& job, const Chain& chain,
                       const StepProblem& step, const ProblemGraph& graph,
                       absl::Span<const std::vector<ChainTurn>> orders);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_LAYER_CHAIN_H_
