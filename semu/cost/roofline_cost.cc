// Lays out a layer's operations kind by kind and sums their times and bytes.
// Arithmetic is in double, since products of sizes pass int64; the results are
// rounded and bounded at the end.

#include "semu/cost/roofline_cost.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "semu/cost/ops/op_factors.h"
#include "semu/cost/ops/op_rules.h"
#include "semu/model/layer_size.h"

namespace pipeweaver::semu {
namespace {

// Bound of every time and size, so that sums over any step stay within int64.
constexpr double kMaxValue = 1e14;

constexpr double kFlashBackwardFactor = 2.5;
constexpr double kFp32Bytes = 4;

int64_t Bounded(double value) {
  return static_cast<int64_t>(std::llround(std::min(value, kMaxValue)));
}

// Sums the operations of one layer.
class LayerOps {
 public:
  // `fitted` may be null: matmuls take the roofline too.
  LayerOps(const Platform& platform, const LayerQuery& query,
           const RooflineFactors& factors, const DeviceFactors* fitted)
      : platform_(platform),
        query_(query),
        factors_(factors),
        fitted_(platform.data_type == DataType::kFp32 ? nullptr : fitted),
        tp_(platform.parallelism.tensor_parallel),
        cp_(platform.parallelism.context_parallel),
        element_(static_cast<double>(DataTypeBytes(platform.data_type))),
        tokens_(static_cast<double>(query.shape.tokens) / cp_) {}

  LayerCost Run() {
    switch (query_.layer.kind) {
      case LayerKind::kTransformer:
      case LayerKind::kDit:
        Transformer();
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
    return Result();
  }

 private:
  double OpNs(OpKind kind, double flops, double bytes, double network) const {
    const OpFactors& f = factors_[static_cast<int>(kind)];
    const double compute =
        flops / (f.flops_efficiency *
                 static_cast<double>(platform_.device.peak_flops_per_second));
    const double memory =
        bytes / (f.memory_efficiency *
                 static_cast<double>(
                     platform_.device.memory_bandwidth_bytes_per_second));
    const double net =
        network /
        (f.network_efficiency *
         static_cast<double>(
             platform_.links.tensor_parallel.bandwidth_bytes_per_second));
    return std::max({compute, memory, net}) * 1e9 + f.launch_ns;
  }

  // Of a matmul by the rule fitted to the device, else by the roofline. `bytes`
  // are moved at least.
  double MatmulNs(double rows, double inner, double columns, double bytes,
                  MatmulRole role) const {
    const double flops = 2 * rows * inner * columns;
    if (fitted_ == nullptr || flops <= 0) {
      return OpNs(OpKind::kMatmul, flops, bytes, 0);
    }
    const auto size = [](double value) {
      return std::max<int64_t>(Bounded(value), 1);
    };
    const DeviceFigures figures = {
        static_cast<double>(platform_.device.peak_flops_per_second),
        static_cast<double>(
            platform_.device.memory_bandwidth_bytes_per_second)};
    return std::max(MatmulUs(*fitted_, figures, size(rows), size(columns),
                             size(inner), role) *
                        1e3,
                    OpNs(OpKind::kMatmul, 0, bytes, 0));
  }

  // rows x in times in x out, each as this GPU holds it. `wanted` false: the
  // input has no gradient.
  void Matmul(double rows, double in, double out, bool input_wanted = true,
              MatmulRole role = MatmulRole::kGeneral) {
    const double weights = in * out;
    const double values = (rows * in + rows * out) * element_;
    const double bytes = values + weights * element_;
    forward_ += MatmulNs(rows, in, out, bytes, role);
    if (query_.input_grad && input_wanted) {
      input_grad_ += MatmulNs(rows, out, in, bytes, MatmulRole::kGeneral);
    }
    if (query_.weight_grad) {
      weight_grad_ += MatmulNs(in, rows, out, values + 2 * weights * kFp32Bytes,
                               MatmulRole::kGeneral);
      split_extra_ +=
          ElementwiseNs(2 * rows * out) -
          factors_[static_cast<int>(OpKind::kElementwise)].launch_ns;
    }
  }

  double ElementwiseNs(double elements) const {
    return OpNs(OpKind::kElementwise, 0, elements * element_, 0);
  }

  // `elements` read or written in the forward; the backward also reads the
  // incoming gradient and its saved input. `rebuilt`: selective recompute runs
  // it once more.
  void Elementwise(double elements, bool rebuilt = false) {
    const double ns = ElementwiseNs(elements);
    forward_ += ns;
    if (query_.input_grad) input_grad_ += ElementwiseNs(1.5 * elements);
    if (rebuilt) rebuild_ += ns;
  }

  // All-gather or reduce-scatter of rows x width over the tensor-parallel GPUs.
  double CollectiveNs(double rows, double width) const {
    if (tp_ == 1) return 0;
    return OpNs(OpKind::kCollective, 0, 0,
                rows * width * element_ * (tp_ - 1) / tp_) +
           static_cast<double>(platform_.links.tensor_parallel.latency_ns);
  }

  // In front of matrices divided by columns. The weight gradient gathers anew.
  void Gather(double rows, double width) {
    const double ns = CollectiveNs(rows, width);
    forward_ += ns;
    if (query_.input_grad) input_grad_ += ns;
    if (query_.weight_grad) weight_grad_ += ns;
  }

  // Behind matrices divided by rows.
  void Scatter(double rows, double width) {
    const double ns = CollectiveNs(rows, width);
    forward_ += ns;
    if (query_.input_grad) input_grad_ += ns;
  }

  // `products`: pairs of query and key tokens, over all context-parallel GPUs.
  void Attention(double products, double key_tokens, double kv_width) {
    const double width = static_cast<double>(query_.layer.hidden_size) / tp_;
    const double flops = 4 * products / cp_ * width;
    const double bytes =
        (2 * tokens_ * width + 2 * key_tokens * kv_width / tp_) * element_;
    const double ring = 2 * key_tokens * kv_width / tp_ * element_ * (cp_ - 1);
    forward_ += OpNs(OpKind::kAttention, flops, bytes, ring);
    if (query_.input_grad) {
      input_grad_ += OpNs(OpKind::kAttention, kFlashBackwardFactor * flops,
                          2 * bytes, 2 * ring);
    }
  }

  void Transformer() {
    const LayerSpec& layer = query_.layer;
    const double h = static_cast<double>(layer.hidden_size);
    const double kv = static_cast<double>(KeyValueWidth(layer));
    const double f = static_cast<double>(layer.ffn_size);
    const double gates = layer.gated_ffn ? 2 : 1;
    const double shard = tokens_ / tp_;  // rows outside the matrices
    const double squares = static_cast<double>(query_.shape.sum_squares) *
                           (layer.causal ? 0.5 : 1.0);
    const bool dit = layer.kind == LayerKind::kDit;
    const double modulations = dit ? 2 : 0;

    Elementwise(2 * shard * h, true);  // norm
    Gather(tokens_, h);
    Matmul(tokens_, h, (h + 2 * kv) / tp_);
    Elementwise(2 * shard * (h + kv));  // rotary, or norm of queries and keys
    Attention(squares, tokens_, kv);
    Matmul(tokens_, h / tp_, h, true, MatmulRole::kAttentionOutput);
    Scatter(tokens_, h);
    Elementwise(3 * shard * h);  // residual

    double condition = 0;  // rows of the condition
    if (dit) {
      condition = static_cast<double>(query_.shape.condition_tokens) / cp_;
      Elementwise(2 * shard * h, true);  // norm
      Gather(tokens_, h);
      Matmul(tokens_, h, h / tp_);
      Matmul(condition, h, 2 * kv / tp_);
      Attention(static_cast<double>(query_.shape.condition_products), condition,
                kv);
      Matmul(tokens_, h / tp_, h, true, MatmulRole::kAttentionOutput);
      Scatter(tokens_, h);
      Elementwise(3 * shard * h);  // residual
      Elementwise(modulations * 2 * shard * h, true);
    }

    Elementwise(2 * shard * h, true);  // norm
    Gather(tokens_, h);
    Matmul(tokens_, h, gates * f / tp_);
    Elementwise(shard * f * (gates + 1), true);
    Matmul(tokens_, f / tp_, h, true, MatmulRole::kFfnDown);
    Scatter(tokens_, h);
    Elementwise(3 * shard * h);  // residual

    // Elements a token, divided over the tensor-parallel GPUs: what the
    // backward of norms, attention and activation reads, and what weight
    // gradients read.
    const double norm_in = (dit ? 3 : 2) * h;
    const double attention =
        (2 * h + 2 * kv) + (dit ? 2 * h : 0);  // q, k, v, output
    const double activation_in = gates * f;
    const double norm_out = (dit ? 3 + modulations : 2) * h;
    const double activation_out = f;
    const double condition_kv = condition * 2 * kv / tp_ * element_;
    const double log_sums =
        (dit ? 2 : 1) * shard * static_cast<double>(layer.heads) * kFp32Bytes;
    const double row = shard * element_;
    always_bytes_ =
        row * (norm_in + attention + activation_in) + condition_kv + log_sums;
    // The attention's output stands in both lists, once in memory.
    const double weight_inputs = norm_out + activation_out;
    if (query_.weight_grad) selective_bytes_ = row * weight_inputs;
    input_bytes_ = row * h;
    workspace_bytes_ = row * ((gates + 1) * f + 2 * h);
    if (query_.weight_grad) {
      const double attention_outputs = (dit ? 2 : 1) * h;
      const double output_grads =
          (h + 2 * kv) + h + gates * f + h + (dit ? 2 * h : 0);
      weight_grad_bytes_ = row * (weight_inputs - modulations * h +
                                  attention_outputs + output_grads) +
                           condition_kv;
    }
    output_bytes_ = row * h;
  }

  void Embedding() {
    const double h = static_cast<double>(query_.layer.hidden_size);
    const double row = tokens_ / tp_ * element_;
    forward_ += ElementwiseNs(2 * tokens_ * h);
    forward_ += CollectiveNs(tokens_, h);
    if (query_.weight_grad) {
      weight_grad_ += CollectiveNs(tokens_, h);
      weight_grad_ +=
          ElementwiseNs(tokens_ * h * (1 + 2 * kFp32Bytes / element_));
      weight_grad_bytes_ = row * h;
    }
    always_bytes_ = input_bytes_ = 8 * tokens_ / tp_;
    output_bytes_ = row * h;
  }

  void LmHead() {
    const double h = static_cast<double>(query_.layer.hidden_size);
    const double v = static_cast<double>(query_.layer.vocab_size) / tp_;
    const double row = tokens_ / tp_ * element_;
    Gather(tokens_, h);
    Matmul(tokens_, h, v);
    Elementwise(3 * tokens_ * v);  // softmax and loss
    input_bytes_ = row * h;
    always_bytes_ = input_bytes_ + tokens_ * v * kFp32Bytes;
    workspace_bytes_ = tokens_ * v * element_;
    if (query_.weight_grad) {
      weight_grad_bytes_ = input_bytes_ + tokens_ * v * element_;
    }
    output_bytes_ = row * h;
  }

  void PatchEmbed() {
    const double h = static_cast<double>(query_.layer.hidden_size);
    const double in = static_cast<double>(query_.layer.input_size);
    const double shard = tokens_ / tp_;
    Matmul(shard, in, h, /*input_wanted=*/false);
    always_bytes_ = input_bytes_ = shard * in * element_;
    if (query_.weight_grad) {
      weight_grad_bytes_ = always_bytes_ + shard * h * element_;
    }
    output_bytes_ = shard * h * element_;
  }

  void Projector() {
    const double h = static_cast<double>(query_.layer.hidden_size);
    const double f = static_cast<double>(query_.layer.ffn_size);
    const double out = static_cast<double>(query_.layer.input_size);
    const double shard = tokens_ / tp_;
    const double row = shard * element_;
    Gather(tokens_, h);
    Matmul(tokens_, h, f / tp_);
    Elementwise(2 * shard * f, true);
    Matmul(tokens_, f / tp_, out);
    Scatter(tokens_, out);
    input_bytes_ = row * h;
    always_bytes_ = row * (h + f);
    if (query_.weight_grad) {
      selective_bytes_ = row * f;
      weight_grad_bytes_ = row * (h + f) + row * (f + out);
    }
    workspace_bytes_ = row * 2 * f;
    output_bytes_ = row * out;
  }

  LayerCost Result() const {
    LayerCost cost;
    const double all = always_bytes_ + selective_bytes_;
    const bool backward = query_.input_grad || query_.weight_grad;
    const double copy_ns =
        platform_.links.host.bandwidth_bytes_per_second == 0
            ? 0
            : all * 1e9 /
                      static_cast<double>(
                          platform_.links.host.bandwidth_bytes_per_second) +
                  static_cast<double>(platform_.links.host.latency_ns);
    for (int s = 0; s < kNumMemoryStrategies; ++s) {
      StrategyCost& out = cost.strategies[s];
      out.forward_ns = Bounded(forward_);
      if (!backward) continue;
      double rebuild_ns = 0;
      double kept = all;
      switch (static_cast<MemoryStrategy>(s)) {
        case MemoryStrategy::kKeep:
          break;
        case MemoryStrategy::kSelectiveRecompute:
          // A layer that is not trained keeps none of it anyway.
          if (selective_bytes_ > 0) rebuild_ns = rebuild_;
          kept = always_bytes_;
          break;
        case MemoryStrategy::kFullRecompute:
          if (input_bytes_ < all) rebuild_ns = forward_;
          kept = input_bytes_;
          break;
        case MemoryStrategy::kOffload:
          kept = 0;
          out.copy_bytes = Bounded(all);
          break;
      }
      out.input_grad_ns = Bounded(input_grad_ + rebuild_ns);
      out.kept_bytes = Bounded(kept);
      out.rebuilt_bytes = Bounded(all - kept);
      out.workspace_bytes = Bounded(workspace_bytes_);
      if (query_.weight_grad) {
        out.weight_grad_ns = Bounded(weight_grad_ + split_extra_);
        out.fused_backward_ns =
            Bounded(input_grad_ + rebuild_ns + weight_grad_);
        out.weight_grad_bytes = Bounded(weight_grad_bytes_);
      }
    }
    cost.forward_bytes = Bounded(all + workspace_bytes_ + output_bytes_);
    cost.copy_ns = Bounded(copy_ns);
    cost.output_bytes = Bounded(output_bytes_);
    return cost;
  }

  const Platform& platform_;
  const LayerQuery& query_;
  const RooflineFactors& factors_;
  const DeviceFactors* const fitted_;
  const double tp_;
  const double cp_;
  const double element_;  // bytes
  const double tokens_;   // of one context-parallel GPU

  // Nanoseconds.
  double forward_ = 0;
  double input_grad_ = 0;
  double weight_grad_ = 0;
  double split_extra_ = 0;  // of the weight gradient apart
  double rebuild_ = 0;      // of selective recompute

  double always_bytes_ = 0;     // kept even under selective recompute
  double selective_bytes_ = 0;  // rebuilt there
  double input_bytes_ = 0;
  double workspace_bytes_ = 0;
  double weight_grad_bytes_ = 0;
  double output_bytes_ = 0;
};

}  // namespace

LayerCost RooflineCost::Cost(const Platform& platform,
                             const LayerQuery& query) const {
  const RooflineFactors factors =
      fixed_ ? factors_ : DefaultFactors(platform.device.name);
  const DeviceFactors* const fitted =
      fixed_ ? nullptr : FindDeviceFactors(platform.device.name);
  return LayerOps(platform, query, factors, fitted).Run();
}

std::string RooflineCost::Fingerprint() const {
  // The number counts changes of the rules above.
  std::string fingerprint = "roofline 2";
  if (fixed_) {
    for (const OpFactors& f : factors_) {
      absl::StrAppend(&fingerprint, " ", f.flops_efficiency, ",",
                      f.memory_efficiency, ",", f.network_efficiency, ",",
                      f.launch_ns);
    }
  }
  return fingerprint;
}

}  // namespace pipeweaver::semu
