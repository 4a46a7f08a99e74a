// Streams are first in, first out and operations are issued in an order in
// which writers stand before readers, so one walk in that order finds all
// times; a second one over births and deaths of tensors finds the peak.

#include "semu/graph/pass_simulator.h"

#include <algorithm>
#include <vector>

namespace pipeweaver::semu {
namespace {

constexpr int kCompute = static_cast<int>(Stream::kCompute);

struct Life {
  bool born = false;
  bool stays = false;
  int64_t written_ns = 0;  // end of its last writer so far
  int64_t ends_ns = 0;     // end of its last user so far
};

struct Change {
  int64_t at_ns = 0;
  int64_t bytes = 0;

  bool operator<(const Change& other) const { return at_ns < other.at_ns; }
};

}  // namespace

PassFigures SimulatePass(const LayerGraph& graph, const Pass& pass,
                         absl::Span<const int64_t> op_ns) {
  PassFigures figures;
  std::vector<Life> lives(graph.tensor_bytes.size());
  std::vector<Change> births;
  births.reserve(lives.size());
  const auto be_born = [&](int tensor, int64_t at_ns) {
    if (lives[tensor].born) return;
    lives[tensor].born = true;
    births.push_back({at_ns, graph.tensor_bytes[tensor]});
  };
  for (const int tensor : pass.inputs) be_born(tensor, 0);

  std::array<int64_t, kNumStreams> free_ns = {};
  for (const int index : pass.ops) {
    const Op& op = graph.ops[index];
    const int stream = static_cast<int>(op.stream);
    int64_t start_ns = free_ns[stream];
    for (const int tensor : op.reads) {
      start_ns = std::max(start_ns, lives[tensor].written_ns);
    }
    for (const int tensor : op.writes) {
      start_ns = std::max(start_ns, lives[tensor].written_ns);
    }
    const bool holds_compute = op.stream == Stream::kTensorParallel;
    if (holds_compute) start_ns = std::max(start_ns, free_ns[kCompute]);
    const int64_t end_ns = start_ns + op_ns[index];
    free_ns[stream] = end_ns;
    if (holds_compute) free_ns[kCompute] = end_ns;
    figures.busy_ns[stream] += op_ns[index];
    figures.latency_ns = std::max(figures.latency_ns, end_ns);
    for (const int tensor : op.reads) {
      lives[tensor].ends_ns = std::max(lives[tensor].ends_ns, end_ns);
    }
    for (const int tensor : op.writes) {
      be_born(tensor, start_ns);
      lives[tensor].written_ns = end_ns;
      lives[tensor].ends_ns = std::max(lives[tensor].ends_ns, end_ns);
    }
  }

  for (const int tensor : pass.results) {
    be_born(tensor, 0);
    lives[tensor].stays = true;
  }
  std::vector<Change> deaths;
  deaths.reserve(lives.size());
  for (size_t tensor = 0; tensor < lives.size(); ++tensor) {
    if (lives[tensor].born && !lives[tensor].stays) {
      deaths.push_back({lives[tensor].ends_ns, graph.tensor_bytes[tensor]});
    }
  }
  if (!std::is_sorted(births.begin(), births.end())) {
    std::sort(births.begin(), births.end());
  }
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
