// From a layer to its operations.

#ifndef SEMU_GRAPH_LAYER_EXPANDER_H_
#define SEMU_GRAPH_LAYER_EXPANDER_H_

#include "semu/cost/cost_model.h"
#include "semu/graph/layer_template.h"
#include "semu/graph/op_graph.h"

namespace pipeweaver::semu {

// The operations of a layer on one GPU. What is modelled:
// - tensor parallelism with sequence parallelism as in Megatron-LM (arXiv
//   2205.05198): all-gather in front of a matrix divided by columns,
//   reduce-scatter behind one divided by rows; the weight gradient gathers its
//   operand anew, so that only shards are kept; apart from the input gradient
//   it gathers the output's gradient anew, too;
// - context parallelism: keys and values go round a ring under the attention
//   (arXiv 2310.01889), and so do their gradients;
// - attention over packed sequences that never writes its scores (arXiv
//   2205.14135): its backward does 2.5 times the arithmetic of its forward;
// - weight gradients summed in fp32;
// - a diffusion block's scale and shift behind its norms (arXiv 2212.09748),
//   and its cross-attention to a condition that all layers share;
// - convolutions over patches or audio frames as one matmul of unfolded inputs.
// Sizes that do not divide are rounded up. Biases, dropout and the gradients of
// norms' own weights are left out.
LayerTemplate ExpandTemplate(const Platform& platform, const LayerSpec& layer,
                             bool weight_grad, bool input_grad);

// The same at the query's shape.
LayerGraph ExpandLayer(const Platform& platform, const LayerQuery& query);

enum class PassKind {
  kForward,
  kInputGrad,
  kWeightGrad,
  kBackward,  // both gradients
  kOffload,   // what was saved, to the host
};
inline constexpr int kNumPassKinds = 5;

// A pass under a strategy. What is recomputed is recomputed as the backward, or
// the input gradient, begins; what was offloaded is back by then. Without a
// backward the forward keeps nothing.
Pass PassOf(const LayerGraph& graph, PassKind kind, MemoryStrategy strategy);

// The tensors on the GPU from the forward to the backward.
std::vector<int> KeptTensors(const LayerGraph& graph, MemoryStrategy strategy);

}  // namespace pipeweaver::semu

#endif  // SEMU_GRAPH_LAYER_EXPANDER_H_
