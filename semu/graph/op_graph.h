// Operations of one layer on one GPU of a rank, the tensors between them, and
// which of them each pass of the layer runs.

#ifndef SEMU_GRAPH_OP_GRAPH_H_
#define SEMU_GRAPH_OP_GRAPH_H_

#include <cstdint>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "semu/cost/ops/op_factors.h"

namespace pipeweaver::semu {

enum class OpKind {
  kMatmul,
  kAttention,
  kElementwise,   // reads and writes memory, little arithmetic
  kCollective,    // among the tensor-parallel GPUs
  kRingTransfer,  // to the next context-parallel GPU
  kHostCopy,
};
inline constexpr int kNumOpKinds = 6;

// Operations of a stream run one at a time, in the order of their issue.
enum class Stream {
  kCompute,
  kTensorParallel,
  kContextParallel,
  kToHost,
  kFromHost,
};
inline constexpr int kNumStreams = 5;

// One operation. Sizes are those of one GPU.
struct Op {
  OpKind kind = OpKind::kElementwise;
  Stream stream = Stream::kCompute;
  // kMatmul: rows x inner times inner x columns.
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t inner = 0;
  MatmulRole role = MatmulRole::kGeneral;
  // kElementwise: what is read and written.
  MemoryOpKind memory_kind = MemoryOpKind::kNorm;
  // kCollective
  CollectiveOpKind collective = CollectiveOpKind::kAllGather;
  // kMatmul, kAttention: floating-point operations.
  double flops = 0;
  // On the compute stream: read and written at least. kCollective: the whole
  // tensor, before a scatter or after a gather. Else: moved.
  int64_t bytes = 0;
};

// What an operation uses, as indices into LayerGraph::tensor_bytes. A tensor
// that several operations write is filled by them in turn. One that no
// operation of a pass writes is there from the start.
struct OpTensors {
  absl::InlinedVector<int, 4> reads;
  absl::InlinedVector<int, 2> writes;
};

// What a layer's operations are before a choice of pass and memory strategy.
// Lists of operations hold indices into `ops`, in the order of issue; an
// operation may stand in several. Lists of tensors hold indices into
// `tensor_bytes`.
struct LayerGraph {
  std::vector<Op> ops;
  std::vector<OpTensors> op_tensors;  // [op]
  // 0 for what is held elsewhere.
  std::vector<int64_t> tensor_bytes;

  // What the layer is given, and what it hands on; -1: nothing.
  int input = -1;
  int output = -1;
  // The gradients of both.
  int output_grad = -1;
  int input_grad = -1;

  std::vector<int> forward;
  // Gradients of activations, of weights, and both as one pass.
  std::vector<int> input_grads;
  std::vector<int> weight_grads;
  std::vector<int> backward;
  // Of the forward, those that selective recompute runs again.
  std::vector<int> rebuilds;

  // What the backward reads of the forward, and of it, what selective recompute
  // keeps.
  std::vector<int> saved;
  std::vector<int> saved_selectively;
  // Copies of what was saved to the host.
  std::vector<int> copies;
};

// Operations in the order of their issue, and what is live at both ends: the
// inputs at the start, those of `results` at the end. Other tensors live from
// the start of the first operation that writes them to the end of the last that
// uses them.
struct Pass {
  std::vector<int> ops;
  std::vector<int> inputs;
  std::vector<int> results;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_GRAPH_OP_GRAPH_H_
