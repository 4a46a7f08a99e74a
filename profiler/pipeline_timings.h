// Measured 1F1B pipeline steps: the stages' start and end times on every rank,
// the hop between ranks that explains them, and the makespan that stage
// durations predict.

#ifndef PROFILER_PIPELINE_TIMINGS_H_
#define PROFILER_PIPELINE_TIMINGS_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace pipeweaver::profiler {

struct StageInterval {
  int64_t start_ns = 0;
  int64_t end_ns = 0;
};

// One rank's stages of an iteration, by microbatch.
struct RankIteration {
  std::vector<StageInterval> forwards;
  std::vector<StageInterval> backwards;
};

// By iteration, then by rank: every iteration has all ranks, and every rank the
// same number of forwards and backwards.
using PipelineTimings = std::map<int64_t, std::vector<RankIteration>>;

// Durations in ns by rank and microbatch.
struct StageDurations {
  std::vector<std::vector<int64_t>> forward_ns;
  std::vector<std::vector<int64_t>> backward_ns;
};

// Reads what Primus' pipeline visualizer dumps: for each rank in order one JSON
// object {"<iteration>": {"fwd_start": [ms], "fwd_end", "bwd_start",
// "bwd_end"}}, times from the iteration's start. INVALID_ARGUMENT names rank,
// iteration, field and rule.
absl::StatusOr<PipelineTimings> ParsePipelineTimings(
    const std::vector<std::string>& rank_json);

// From the first start to the last end over the ranks.
int64_t MeasuredMakespanNs(const std::vector<RankIteration>& iteration);

StageDurations DurationsOf(const std::vector<RankIteration>& iteration);

// Median over the iterations first..last, each of which must be there.
absl::StatusOr<StageDurations> MedianDurations(const PipelineTimings& timings,
                                               int64_t first, int64_t last);

// Makespan of 1F1B: rank r of P does P - 1 - r forwards, then forward and
// backward in turn, then the backwards left. A stage starts when its rank is
// free and `hop_ns` after the stage on the neighbour that it waits for.
int64_t OneForwardOneBackwardNs(const StageDurations& durations,
                                int64_t hop_ns);

// The hop, in whole microseconds, that minimises the sum over iterations
// first..last of |simulated - measured makespan|, each simulated from its own
// durations.
absl::StatusOr<int64_t> FitHopNs(const PipelineTimings& timings, int64_t first,
                                 int64_t last);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_PIPELINE_TIMINGS_H_
