#include "semu/graph/subgraph_key.h"

#include <cstdint>
#include <cstring>

#include "semu/base/check.h"
#include "semu/base/little_endian.h"

namespace pipeweaver::semu {
namespace {

// Counts changes of the layout and of what costs are computed by: ExpandLayer,
// SimulatePass, SetLayerBytes.
constexpr uint64_t kVersion = 2;
constexpr int kIntegers = 18;
constexpr int kHeaderBytes = 8;
constexpr int kKeyBytes = kHeaderBytes + kIntegers * 8 + kEntriesDigestBytes;

}  // namespace

OpKinds OpKindsOf(const LayerSpec& layer, const Parallelism& parallelism) {
  OpKinds kinds;
  const auto add = [&kinds](OpKind kind) { kinds.set(static_cast<int>(kind)); };
  add(OpKind::kHostCopy);
  if (layer.kind != LayerKind::kEmbedding) add(OpKind::kMatmul);
  if (layer.kind == LayerKind::kPatchEmbed) return kinds;
  add(OpKind::kElementwise);
  if (parallelism.tensor_parallel > 1) add(OpKind::kCollective);
  if (layer.kind == LayerKind::kTransformer || layer.kind == LayerKind::kDit) {
    add(OpKind::kAttention);
    if (parallelism.context_parallel > 1) add(OpKind::kRingTransfer);
  }
  return kinds;
}

std::string SubgraphKey(const Platform& platform, const LayerQuery& query,
                        absl::string_view entries_digest) {
  PW_CHECK(entries_digest.size() == kEntriesDigestBytes);
  const LayerSpec& layer = query.layer;
  const Shape& shape = query.shape;
  const bool dit = layer.kind == LayerKind::kDit;
  const bool block = dit || layer.kind == LayerKind::kTransformer;
  const bool projector = layer.kind == LayerKind::kProjector;
  const bool head = layer.kind == LayerKind::kLmHead;
  const bool patches = layer.kind == LayerKind::kPatchEmbed;
  const int64_t integers[kIntegers] = {
      static_cast<int64_t>(layer.kind),
      layer.hidden_size,
      block || projector ? layer.ffn_size : 0,
      block ? layer.heads : 0,
      block ? layer.kv_heads : 0,
      block ? layer.gated_ffn : 0,
      block ? layer.causal : 0,
      head ? layer.vocab_size : 0,
      patches || projector ? layer.input_size : 0,
      query.weight_grad,
      TakesInputGrad(layer.kind) ? query.input_grad : 0,
      platform.parallelism.tensor_parallel,
      platform.parallelism.context_parallel,
      static_cast<int64_t>(platform.data_type),
      shape.tokens,
      block ? shape.sum_squares : 0,
      dit ? shape.condition_tokens : 0,
      dit ? shape.condition_products : 0,
  };
  std::string key(kKeyBytes, '\0');
  // The upper half is the version.
  char* out = PutLittleEndian64(kVersion << 32, key.data());
  std::memcpy(key.data(), "PWSG", 4);
  for (const int64_t integer : integers) {
    out = PutLittleEndian64(static_cast<uint64_t>(integer), out);
  }
  std::memcpy(out, entries_digest.data(), kEntriesDigestBytes);
  return key;
}

}  // namespace pipeweaver::semu
