// Streams are first in, first out and operations are issued in an order in
// which writers stand before readers, so one walk in that order finds all
// times; a second one over births and deaths of tensors finds the peak.

#include "semu/graph/pass_simulator.h"

#include <algorithm>
#include <vector>

#include "absl/container/inlined_vector.h"

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
    const OpTensors& tensors = graph.op_tensors[index];
    const Stream stream = graph.ops[index].stream;
    int64_t& stream_free_ns = free_ns[static_cast<int>(stream)];
    int64_t start_ns = stream_free_ns;
    for (const int tensor : tensors.reads) {
      start_ns = std::max(start_ns, written_ns[tensor]);
    }
    for (const int tensor : tensors.writes) {
      start_ns = std::max(start_ns, written_ns[tensor]);
    }
    const bool holds_compute = stream == Stream::kTensorParallel;
    if (holds_compute) start_ns = std::max(start_ns, free_ns[kCompute]);
    const int64_t end_ns = start_ns + op_ns[index];
    stream_free_ns = end_ns;
    if (holds_compute) free_ns[kCompute] = end_ns;
    for (const int tensor : tensors.writes) written_ns[tensor] = end_ns;
    latency_ns = std::max(latency_ns, end_ns);
    on_op(index, start_ns, end_ns);
  }
  return latency_ns;
}

}  // namespace

PassLatency::PassLatency(const LayerGraph& graph, const Pass& pass) {
  constexpr int kNobody = -1;
  // [tensor]: the step that wrote it last, or kNobody.
  std::vector<int> writers(graph.tensor_bytes.size(), kNobody);
  steps_.reserve(pass.ops.size());
  for (const int op : pass.ops) {
    const int index = static_cast<int>(steps_.size());
    const OpTensors& tensors = graph.op_tensors[op];
    Step& step = steps_.emplace_back();
    step.op = op;
    // A collective waits for the compute stream and holds it, so that both are
    // free from the same time on.
    const Stream stream = graph.ops[op].stream;
    step.stream = static_cast<int>(
        stream == Stream::kTensorParallel ? Stream::kCompute : stream);
    step.first_wait = static_cast<int>(waits_.size());
    const auto wait_for_writer = [&](int tensor) {
      const int writer = writers[tensor];
      // A stream's earlier operations have ended anyway.
      if (writer == kNobody || steps_[writer].stream == step.stream) return;
      waits_.push_back(writer);
    };
    for (const int tensor : tensors.reads) wait_for_writer(tensor);
    for (const int tensor : tensors.writes) wait_for_writer(tensor);
    step.end_wait = static_cast<int>(waits_.size());
    for (const int tensor : tensors.writes) writers[tensor] = index;
    if (step.stream != steps_[0].stream) one_stream_ = false;
  }
}

int64_t PassLatency::Ns(absl::Span<const int64_t> op_ns) const {
  if (one_stream_) {
    int64_t sum_ns = 0;
    for (const Step& step : steps_) sum_ns += op_ns[step.op];
    return sum_ns;
  }
  std::array<int64_t, kNumStreams> free_ns = {};
  constexpr int kUsualSteps = 64;
  absl::InlinedVector<int64_t, kUsualSteps> end_ns(steps_.size());
  for (size_t i = 0; i < steps_.size(); ++i) {
    const Step& step = steps_[i];
    int64_t& stream_free_ns = free_ns[step.stream];
    for (int w = step.first_wait; w < step.end_wait; ++w) {
      stream_free_ns = std::max(stream_free_ns, end_ns[waits_[w]]);
    }
    stream_free_ns += op_ns[step.op];
    end_ns[i] = stream_free_ns;
  }
  return *std::max_element(free_ns.begin(), free_ns.end());
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
  figures.latency_ns =
      Run(graph, pass, op_ns, [&](int op, int64_t start_ns, int64_t end_ns) {
        figures.busy_ns[static_cast<int>(graph.ops[op].stream)] +=
            end_ns - start_ns;
        const OpTensors& tensors = graph.op_tensors[op];
        for (const int tensor : tensors.writes) {
          be_born(tensor, start_ns);
          lives[tensor].ends_ns = std::max(lives[tensor].ends_ns, end_ns);
        }
        for (const int tensor : tensors.reads) {
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
