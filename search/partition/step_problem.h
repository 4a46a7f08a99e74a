// A step's batch, split into sub-microbatches and costed: the scheduling
// problem together with what its sweeps and transfers stand for.

#ifndef SEARCH_PARTITION_STEP_PROBLEM_H_
#define SEARCH_PARTITION_STEP_PROBLEM_H_

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "search/problem/problem.h"
#include "semu/cost/cost_model.h"

namespace pipeweaver::search {

// Items of one microbatch that pass through a module together.
struct SubMicrobatch {
  int module = 0;
  int microbatch = 0;
  std::vector<int>
      items;           // indices within the microbatch and module, ascending
  int64_t tokens = 0;  // before padding to a shape bucket
};

// What a sweep of the problem is: a module's segment run on a sub-microbatch.
struct SweepOrigin {
  int sub_microbatch = 0;  // index into StepProblem::sub_microbatches
  int segment = 0;         // of the module
};

// How a stage choice runs a chunk's layers, in this order from the first on.
struct MemoryChoice {
  std::string name;
  int offload_layers = 0;
  int full_recompute_layers = 0;
  int selective_recompute_layers = 0;
  int keep_layers = 0;
  // Copied to the host and back where offload_layers > 0, per GPU and stage
  // pair: the most of any sub-microbatch of the step.
  int64_t offload_bytes = 0;
};

struct StepProblem {
  Problem problem;
  std::vector<SubMicrobatch> sub_microbatches;
  // One a sub-microbatch: what its layers' costs depend on, padding included.
  std::vector<semu::Shape> shapes;
  // One a sweep of `problem`.
  std::vector<SweepOrigin> sweeps;
  // [sweep]: bytes per GPU of a stage's output, as it crosses to the next stage
  // of the sweep, and of the gradient that answers.
  std::vector<int64_t> output_bytes;
  // [sweep][k]: bytes per GPU that cross to the sweep from its k-th `after`.
  std::vector<absl::InlinedVector<int64_t, 2>> after_bytes;
  // [module][segment][chunk][choice]: what Stage::choices stand for.
  std::vector<std::vector<std::vector<std::vector<MemoryChoice>>>> choices;
  // Pairs (microbatch, module) without items, hence without sweeps.
  std::vector<std::pair<int, int>> empty;
  // [rank], bytes per GPU: taken off the memory limits, since items are so long
  // that their layers need more than StepProblemOptions::layer_reserve_bytes;
  // empty: none.
  std::vector<int64_t> extra_reserve_bytes;
  // Share of the problem's least compute time that comes from measured costs.
  double measured_share = 0;
};

// The most bytes that a choice of the step offloads (MemoryChoice); nullopt: no
// choice offloads.
std::optional<int64_t> MostOffloadBytes(const StepProblem& step);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_STEP_PROBLEM_H_
