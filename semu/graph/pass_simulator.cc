// Streams are first in, first out and operations are issued in an order in
// which writers stand before readers, so one walk in that order finds all
// times; a second one over births and deaths of tensors finds the peak.

#include "semu/graph/pass_simulator.h"

#include <algorithm>
#include <vector>

namespace pipeweaver::semu {
namespace {

constexpr int kCompute = static_cast<int>(Stream::kCompute);

struct Change {
  int64_t at_ns = 0;
  int64_t bytes = 0;

  bool operator<(const Change& other) const { return at_ns < other.at_ns; }
};

// Runs the pass and calls on_op(operation, start, end) for each operation.
// Returns when the last one ends.
template <typename OnOp>
int64_t Run(const LayerGraph& graph, const Pass& pass,
            absl::Span<const int64_t> op_ns, const OnOp& on_op) {
  std::vector<int64_t> written_ns(graph.tensor_bytes.size(), 0);
  std::array<int64_t, kNumStreams> free_ns = {};
  int64_t latency_ns = 0;
  for (const int index : pass.ops) {
    const Op& op = graph.ops[index];
    int64_t& stream_free_ns = free_ns[static_cast<int>(op.stream)];
    int64_t start_ns = stream_free_ns;
    for (const int tensor : op.reads) {
      start_ns = std::max(start_ns, written_ns[tensor]);
    }
    for (const int tensor : op.writes) {
      start_ns = std::max(start_ns, written_ns[tensor]);
    }
    const bool holds_compute = op.stream == Stream::kTensorParallel;
    if (holds_compute) start_ns = std::max(start_ns, free_ns[kCompute]);
    const int64_t end_ns = start_ns + op_ns[index];
    stream_free_ns = end_ns;
    if (holds_compute) free_ns[kCompute] = end_ns;
    for (const int tensor : op.writes) written_ns[tensor] = end_ns;
    latency_ns = std::max(latency_ns, end_ns);
    on_op(op, start_ns, end_ns);
  }
  return latency_ns;
}

}  // namespace

int64_t PassLatencyNs(const LayerGraph& graph, const Pass& pass,
                      absl::Span<const int64_t> op_ns) {
  return Run(graph, pass, op_ns, [](const Op&, int64_t, int64_t) {});
}

PassFigures SimulatePass(const LayerGraph& graph, const Pass& pass,
                         absl::Span<const int64_t> op_ns) {
  struct Life {
    bool born = false;
    bool stays = false;
    int64_t ends_ns = 0;  // end of its last user
  };
  std::vector<Life> lives(graph.tensor_bytes.size());
  std::vector<Change> births;
  const auto be_born = [&](int tensor, int64_t at_ns) {
    if (lives[tensor].born) return;
    lives[tensor].born = true;
    births.push_back({at_ns, graph.tensor_bytes[tensor]});
  };
  for (const int tensor : pass.inputs) be_born(tensor, 0);

  PassFigures figures;
  figures.latency_ns = Run(
      graph, pass, op_ns, [&](const Op& op, int64_t start_ns, int64_t end_ns) {
        figures.busy_ns[static_cast<int>(op.stream)] += end_ns - start_ns;
        for (const int tensor : op.writes) {
          be_born(tensor, start_ns);
          lives[tensor].ends_ns = std::max(lives[tensor].ends_ns, end_ns);
        }
        for (const int tensor : op.reads) {
          lives[tensor].ends_ns = std::max(lives[tensor].ends_ns, end_ns);
        }
      });

  for (const int tensor : pass.results) {
    be_born(tensor, 0);
    lives[tensor].stays = true;
  }
  std::vector<Change> deaths;
  for (size_t tensor = 0; tensor < lives.size(); ++tensor) {
    if (lives[tensor].born && !lives[tensor].stays) {
      deaths.push_back({lives[tensor].ends_ns, graph.tensor_bytes[tensor]});
    }
  }
  std::sort(births.begin(), births.end());
  std::sort(deaths.begin(), deaths.end());

  int64_t live_bytes = 0;
  auto death = deaths.begin();
  for (const Change& birth : births) {
    while (death != deaths.end() && death->at_ns <= birth.at_ns) {
      live_bytes -= death++->bytes;
    }
    live_bytes += birth.bytes;
    figures.peak_bytes = std::max(figures.peak_bytes, live_bytes);
  }
  while (death != deaths.end()) live_bytes -= death++->bytes;
  figures.kept_bytes = live_bytes;
  return figures;
}

}  // namespace pipeweaver::semu
