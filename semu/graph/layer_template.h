// A layer's operations before its shape is known: which there are does not
// depend on the shape, so that a new shape needs new sizes only.

#ifndef SEMU_GRAPH_LAYER_TEMPLATE_H_
#define SEMU_GRAPH_LAYER_TEMPLATE_H_

#include <array>
#include <cstdint>
#include <vector>

#include "semu/cost/cost_model.h"
#include "semu/graph/op_graph.h"

namespace pipeweaver::semu {

// Numbers of rows that a shape gives matrices on one GPU.
enum class RowKind {
  kTokens,  // of one context-parallel GPU
  kShard,   // of one tensor-parallel GPU of it
  kCondition,
};
inline constexpr int kNumRowKinds = 3;

// Bytes that are linear in the numbers of rows.
struct ByteRule {
  double fixed = 0;
  std::array<double, kNumRowKinds> per_row = {};  // [RowKind]

  ByteRule& operator+=(const ByteRule& other);
  friend ByteRule operator+(ByteRule a, const ByteRule& b) { return a += b; }
};

// How a shape sizes an operation.
struct OpRule {
  ByteRule bytes;
  // kMatmul: the dimension that is a number of rows, and which; null: none.
  int64_t Op::*row_dimension = nullptr;
  RowKind rows = RowKind::kTokens;
  // kAttention: floating-point operations are 4 * factor * width for each pair
  // of tokens, of one block of the ring on one GPU. Pairs are those of the
  // items' own tokens, or of tokens and their condition's.
  double width = 0;
  double factor = 1;
  bool of_condition = false;
};

struct LayerTemplate {
  int64_t tensor_parallel = 1;
  int64_t context_parallel = 1;
  // Of the pairs of an item's own tokens, the half is masked.
  bool causal = false;
  // Without what depends on the shape.
  LayerGraph graph;
  std::vector<ByteRule> tensor_rules;  // [tensor]
  std::vector<OpRule> op_rules;        // [op]

  // Sets `ops` to the graph's operations at `shape`. No size in bytes is above
  // 10^14.
  void SetOpsAt(const Shape& shape, std::vector<Op>* ops) const;
  // The whole graph at `shape`, sizes of tensors bounded likewise.
  LayerGraph GraphAt(const Shape& shape) const;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_GRAPH_LAYER_TEMPLATE_H_
