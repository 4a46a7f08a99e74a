// Matrix sizes by layer kind.

#include "semu/model/layer_size.h"

#include "semu/base/check.h"

namespace pipeweaver::semu {

int64_t KeyValueWidth(const LayerSpec& layer) {
  return layer.hidden_size / layer.heads * layer.kv_heads;
}

int64_t ParameterCount(const LayerSpec& layer) {
  const int64_t h = layer.hidden_size;
  switch (layer.kind) {
    case LayerKind::kTransformer:
    case LayerKind::kDit: {
      const int64_t attention = 2 * h * h + 2 * h * KeyValueWidth(layer);
      const int64_t ffn = (layer.gated_ffn ? 3 : 2) * h * layer.ffn_size;
      const int64_t norms = 2 * h;
      return (layer.kind == LayerKind::kDit ? 2 : 1) * attention + ffn + norms;
    }
    case LayerKind::kEmbedding:
    case LayerKind::kLmHead:
      return h * layer.vocab_size;
    case LayerKind::kPatchEmbed:
      return h * layer.input_size;
    case LayerKind::kProjector:
      return h * layer.ffn_size + layer.ffn_size * layer.input_size;
  }
  PW_CHECK(false && "unknown layer kind");
}

int64_t OutputWidth(const LayerSpec& layer) {
  return layer.kind == LayerKind::kProjector ? layer.input_size
                                             : layer.hidden_size;
}

int64_t OutputWidth(const Module& module) {
  return OutputWidth(module.layers.back().layer);
}

}  // namespace pipeweaver::semu
