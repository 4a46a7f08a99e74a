// Arithmetic is in double, since products of sizes pass int64; the results are
// rounded and bounded at the end.

#include "semu/cost/layer_bytes.h"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "semu/model/layer_size.h"

namespace pipeweaver::semu {
namespace {

constexpr double kFp32Bytes = 4;

int64_t Bounded(double value) {
  return static_cast<int64_t>(std::llround(std::min<double>(value, kMaxCost)));
}

class LayerBytes {
 public:
  LayerBytes(const Platform& platform, const LayerQuery& query)
      : query_(query),
        tp_(platform.parallelism.tensor_parallel),
        cp_(platform.parallelism.context_parallel),
        element_(static_cast<double>(DataTypeBytes(platform.data_type))),
        tokens_(static_cast<double>(query.shape.tokens) / cp_),
        shard_(tokens_ / tp_) {
    switch (query_.layer.kind) {
      case LayerKind::kTransformer:
      case LayerKind::kDit:
        Block();
        break;
      case LayerKind::kEmbedding:
        Embedding();
        break;
      case LayerKind::kLmHead:
        LmHead();
        break;
      case LayerKind::kPatchEmbed:
        PatchEmbed();
        break;
      case LayerKind::kProjector:
        Projector();
        break;
    }
    if (!query_.weight_grad) selective_ = weight_grad_ = 0;
  }

  void Set(LayerCost* cost) const {
    const double all = always_ + selective_;
    cost->forward_bytes = Bounded(all + workspace_ + output_);
    cost->output_bytes = Bounded(output_);
    const bool input_grad =
        query_.input_grad && TakesInputGrad(query_.layer.kind);
    if (!input_grad && !query_.weight_grad) return;
    const double kept[kNumMemoryStrategies] = {0, input_, always_, all};
    for (int s = 0; s < kNumMemoryStrategies; ++s) {
      StrategyCost& out = cost->strategies[s];
      out.kept_bytes = Bounded(kept[s]);
      out.rebuilt_bytes = Bounded(all - kept[s]);
      out.workspace_bytes = Bounded(workspace_);
      out.weight_grad_bytes = Bounded(weight_grad_);
    }
    cost->strategies[static_cast<int>(MemoryStrategy::kOffload)].copy_bytes =
        Bounded(all);
  }

 private:
  void Block() {
    const LayerSpec& layer = query_.layer;
    const double h = static_cast<double>(layer.hidden_size);
    const double kv = static_cast<double>(KeyValueWidth(layer));
    const double f = static_cast<double>(layer.ffn_size);
    const double gates = layer.gated_ffn ? 2 : 1;
    const bool dit = layer.kind == LayerKind::kDit;
    const double modulations = dit ? 2 : 0;
    const double condition =
        dit ? static_cast<double>(query_.shape.condition_tokens) / cp_ : 0;

    // Elements a token, divided over the tensor-parallel GPUs: what the
    // backward of norms, attention and activation reads, and what weight
    // gradients read.
    const double norm_in = (dit ? 3 : 2) * h;
    const double attention =
        (2 * h + 2 * kv) + (dit ? 2 * h : 0);  // q, k, v, output
    const double norm_out = (dit ? 3 + modulations : 2) * h;
    const double condition_kv = condition * 2 * kv / tp_ * element_;
    const double log_sums =
        (dit ? 2 : 1) * shard_ * static_cast<double>(layer.heads) * kFp32Bytes;
    const double row = shard_ * element_;
    always_ = row * (norm_in + attention + gates * f) + condition_kv + log_sums;
    // The attention's output stands in both lists, once in memory.
    const double weight_inputs = norm_out + f;
    const double attention_outputs = (dit ? 2 : 1) * h;
    const double output_grads =
        (h + 2 * kv) + h + gates * f + h + (dit ? 2 * h : 0);
    selective_ = row * weight_inputs;
    input_ = row * h;
    workspace_ = row * ((gates + 1) * f + 2 * h);
    weight_grad_ = row * (weight_inputs - modulations * h + attention_outputs +
                          output_grads) +
                   condition_kv;
    output_ = row * h;
  }

  void Embedding() {
    always_ = input_ = 8 * tokens_ / tp_;
    weight_grad_ = output_ =
        shard_ * element_ * static_cast<double>(query_.layer.hidden_size);
  }

  void LmHead() {
    const double v = static_cast<double>(query_.layer.vocab_size) / tp_;
    input_ = output_ =
        shard_ * element_ * static_cast<double>(query_.layer.hidden_size);
    always_ = input_ + tokens_ * v * kFp32Bytes;
    workspace_ = tokens_ * v * element_;
    weight_grad_ = input_ + tokens_ * v * element_;
  }

  void PatchEmbed() {
    const double h = static_cast<double>(query_.layer.hidden_size);
    const double in = static_cast<double>(query_.layer.input_size);
    always_ = input_ = shard_ * in * element_;
    output_ = shard_ * h * element_;
    weight_grad_ = always_ + output_;
  }

  void Projector() {
    const double h = static_cast<double>(query_.layer.hidden_size);
    const double f = static_cast<double>(query_.layer.ffn_size);
    const double out = static_cast<double>(query_.layer.input_size);
    const double row = shard_ * element_;
    input_ = row * h;
    always_ = row * (h + f);
    selective_ = row * f;
    weight_grad_ = row * (h + f) + row * (f + out);
    workspace_ = row * 2 * f;
    output_ = row * out;
  }

  const LayerQuery& query_;
  const double tp_;
  const double cp_;
  const double element_;  // bytes
  const double tokens_;   // of one context-parallel GPU
  const double shard_;    // of one tensor-parallel GPU of it

  double always_ = 0;     // kept even under selective recompute
  double selective_ = 0;  // rebuilt there
  double input_ = 0;
  double workspace_ = 0;
  double weight_grad_ = 0;
  double output_ = 0;
};

}  // namespace

void SetLayerBytes(const Platform& platform, const LayerQuery& query,
                   LayerCost* cost) {
  LayerBytes(platform, query).Set(cost);
}

int64_t GatheredBytes(const Platform& platform, const LayerQuery& query) {
  const LayerSpec& layer = query.layer;
  if (platform.parallelism.tensor_parallel == 1 ||
      layer.kind == LayerKind::kPatchEmbed) {
    return 0;
  }
  const int64_t width = layer.kind == LayerKind::kProjector
                            ? std::max(layer.hidden_size, layer.input_size)
                            : layer.hidden_size;
  return Bounded(static_cast<double>(query.shape.tokens) /
                 platform.parallelism.context_parallel *
                 static_cast<double>(width) *
                 static_cast<double>(DataTypeBytes(platform.data_type)));
}

}  // namespace pipeweaver::semu
