// Runs a pass of a layer in simulated time.

#ifndef SEMU_GRAPH_PASS_SIMULATOR_H_
#define SEMU_GRAPH_PASS_SIMULATOR_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "semu/graph/op_graph.h"

namespace pipeweaver::semu {

struct PassFigures {
  int64_t latency_ns = 0;
  // Time that each stream works.
  std::array<int64_t, kNumStreams> busy_ns = {};
  // Most bytes live at once, inputs included, and those live at the end.
  int64_t peak_bytes = 0;
  int64_t kept_bytes = 0;
};

// Every operation begins when its stream is free and whatever wrote the tensors
// it uses has ended; at one time tensors are freed before others are allocated.
// Collectives among tensor-parallel GPUs hold the compute stream, too: they
// need its processors and bandwidth. With that the two layers whose times the
// paper gives (arXiv 2504.14145) are met within 5 % on the H800's factors; with
// gathers and scatters under the matmuls they would come out 14 and 16 % short.
// `op_ns`: time of each of the graph's operations. REQUIRES: no time is
// negative; their sum, and that of the tensors' bytes, is within int64.
PassFigures SimulatePass(const LayerGraph& graph, const Pass& pass,
                         absl::Span<const int64_t> op_ns);

// The latency alone, quickly for many times of the same pass: what the times do
// not change is found once. Immutable.
class PassLatency {
 public:
  // Reads no sizes of the graph's, and keeps no reference to it.
  PassLatency(const LayerGraph& graph, const Pass& pass);

  // SimulatePass(...).latency_ns, with the same requirements.
  int64_t Ns(absl::Span<const int64_t> op_ns) const;

  int num_ops() const { return static_cast<int>(steps_.size()); }

 private:
  // An operation in the order of issue. It runs when its stream is free and the
  // steps waits_[first_wait .. end_wait), of other streams, have ended.
  struct Step {
    int op = 0;
    int stream = 0;
    int first_wait = 0;
    int end_wait = 0;
  };

  std::vector<Step> steps_;
  std::vector<int> waits_;
  // All steps run one after the other.
  bool one_stream_ = true;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_GRAPH_PASS_SIMULATOR_H_
