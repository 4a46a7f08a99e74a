// Keys of subgraphs: equal keys, equal costs.

#ifndef SEMU_GRAPH_SUBGRAPH_KEY_H_
#define SEMU_GRAPH_SUBGRAPH_KEY_H_

#include <bitset>
#include <string>

#include "absl/strings/string_view.h"
#include "semu/cost/cost_model.h"
#include "semu/graph/op_graph.h"

namespace pipeweaver::semu {

using OpKinds = std::bitset<kNumOpKinds>;  // [OpKind]

// The kinds of operations that a layer's graph has, in any of its passes.
OpKinds OpKindsOf(const LayerSpec& layer, const Parallelism& parallelism);

inline constexpr int kEntriesDigestBytes = 32;

// The key of a layer's costs. It holds what ExpandLayer reads and nothing else,
// so that equal subgraphs meet across layers, ranks, replicas,
// sub-microbatches, steps and jobs:
//
//   bytes     content
//   0 .. 3    "PWSG"
//   4 .. 7    version of this layout and of the rules that costs follow
//   8 ..      eighteen integers of 8 bytes: layer kind, hidden size, FFN size,
//             heads, key-value heads, gated, causal, vocabulary, input size;
//             weight gradient wanted, input gradient wanted; tensor and context
//             parallel GPUs; data type; sum of n, sum of
//             n^2, condition's tokens, sum of n * m
//   152 ..    `entries_digest`, of kEntriesDigestBytes: SHA-256 of the cost
//             entries that time the layer's operations (OpTimeRules::Entries):
//             device, links, factors
//
// All integers are little-endian. What the layer's kind does not read is 0.
std::string SubgraphKey(const Platform& platform, const LayerQuery& query,
                        absl::string_view entries_digest);

}  // namespace pipeweaver::semu

#endif  // SEMU_GRAPH_SUBGRAPH_KEY_H_
