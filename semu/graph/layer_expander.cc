// Each primitive adds its forward operations and leaves behind what adds its
// backward operations; these are run last primitive first.

#include "semu/graph/layer_expander.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/types/span.h"
#include "semu/base/check.h"
#include "semu/model/layer_size.h"

namespace pipeweaver::semu {
namespace {

constexpr double kFlashBackwardFactor = 2.5;
constexpr int64_t kFp32Bytes = 4;
constexpr int64_t kWeightGradBytes = 2 * kFp32Bytes;  // read and written
constexpr int64_t kTokenIdBytes = 8;

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// rows x bytes.
ByteRule PerRow(RowKind rows, double bytes) {
  ByteRule rule;
  rule.per_row[static_cast<int>(rows)] = bytes;
  return rule;
}

class Expander {
 public:
  Expander(const Platform& platform, const LayerSpec& layer, bool weight_grad,
           bool input_grad)
      : layer_(layer),
        weight_grad_(weight_grad),
        input_grad_(input_grad),
        tp_(platform.parallelism.tensor_parallel),
        cp_(platform.parallelism.context_parallel),
        element_(DataTypeBytes(platform.data_type)),
        graph_(template_.graph) {
    template_.tensor_parallel = tp_;
    template_.context_parallel = cp_;
    template_.causal = layer.causal;
  }

  LayerTemplate Run() {
    switch (layer_.kind) {
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
    if (input_grad_ || weight_grad_) {
      for (auto step = backward_.rbegin(); step != backward_.rend(); ++step) {
        (*step)();
      }
      if (graph_.input >= 0) graph_.input_grad = grad_[graph_.input];
      FindSaved();
    }
    return std::move(template_);
  }

 private:
  // Which lists an operation joins.
  enum Role { kForwardOnly, kForInput, kForWeight, kForBoth };

  int Tensor(const ByteRule& bytes, bool needs_grad = false) {
    graph_.tensor_bytes.push_back(0);
    template_.tensor_rules.push_back(bytes);
    needs_grad_.push_back(needs_grad);
    grad_.push_back(-1);
    return static_cast<int>(template_.tensor_rules.size()) - 1;
  }
  // rows x width elements.
  ByteRule MatrixBytes(RowKind rows, int64_t width) const {
    return PerRow(rows, static_cast<double>(width * element_));
  }
  int Matrix(RowKind rows, int64_t width, bool needs_grad = false) {
    return Tensor(MatrixBytes(rows, width), needs_grad);
  }
  int MatrixLike(int tensor, bool needs_grad = false) {
    return Tensor(BytesOf({tensor}), needs_grad);
  }
  ByteRule BytesOf(absl::Span<const int> tensors) const {
    ByteRule bytes;
    for (const int tensor : tensors) bytes += template_.tensor_rules[tensor];
    return bytes;
  }

  int Add(const Op& op, const OpRule& rule, OpTensors tensors, Role role) {
    const int index = static_cast<int>(graph_.ops.size());
    graph_.ops.push_back(op);
    graph_.op_tensors.push_back(std::move(tensors));
    template_.op_rules.push_back(rule);
    if (role == kForwardOnly) graph_.forward.push_back(index);
    if (role == kForInput || role == kForBoth) {
      graph_.input_grads.push_back(index);
    }
    if (role == kForWeight || role == kForBoth) {
      graph_.weight_grads.push_back(index);
    }
    if (role != kForwardOnly) graph_.backward.push_back(index);
    return index;
  }

  int AddElementwise(MemoryOpKind kind, const ByteRule& bytes,
                     OpTensors tensors, Role role) {
    Op op;
    op.kind = OpKind::kElementwise;
    op.memory_kind = kind;
    OpRule rule;
    rule.bytes = bytes;
    return Add(op, rule, std::move(tensors), role);
  }

  // An activation or its gradient: rows x inner times weights.
  void AddMatmul(RowKind rows, int64_t inner, int64_t columns, double weights,
                 OpTensors tensors, Role role,
                 MatmulRole matmul = MatmulRole::kGeneral) {
    Op op;
    op.kind = OpKind::kMatmul;
    op.inner = inner;
    op.columns = columns;
    op.role = matmul;
    AddMatmul(op, &Op::rows, rows, weights, std::move(tensors), role);
  }
  // in x rows times rows x out, from `operand` and the output's gradient.
  void AddWeightGrad(int64_t in, RowKind rows, int64_t out, int operand,
                     int output_grad) {
    Op op;
    op.kind = OpKind::kMatmul;
    op.rows = in;
    op.columns = out;
    AddMatmul(op, &Op::inner, rows, WeightBytes(in, out, kWeightGradBytes),
              {{operand, output_grad}, {}}, kForWeight);
  }
  // `weights`: bytes of the operand that is no tensor here.
  void AddMatmul(const Op& op, int64_t Op::*row_dimension, RowKind rows,
                 double weights, OpTensors tensors, Role role) {
    OpRule rule;
    rule.bytes = BytesOf(tensors.reads) + BytesOf(tensors.writes);
    rule.bytes.fixed += weights;
    rule.row_dimension = row_dimension;
    rule.rows = rows;
    Add(op, rule, std::move(tensors), role);
  }

  // `whole`: the tensor that is gathered or scattered, or reduced.
  void AddCollective(CollectiveOpKind kind, int from, int to, int whole,
                     Role role) {
    Op op;
    op.kind = OpKind::kCollective;
    op.stream = Stream::kTensorParallel;
    op.collective = kind;
    OpRule rule;
    rule.bytes = BytesOf({whole});
    Add(op, rule, {{from}, {to}}, role);
  }

  // Hands `gradient` to `tensor`, adding it to what is there.
  void AddGrad(int tensor, int gradient) {
    const int before = grad_[tensor];
    if (before < 0) {
      grad_[tensor] = gradient;
      return;
    }
    const int sum = MatrixLike(gradient);
    AddElementwise(MemoryOpKind::kAdd, BytesOf({before, gradient, sum}),
                   {{before, gradient}, {sum}}, kForInput);
    grad_[tensor] = sum;
  }

  void SetInput(int tensor) { graph_.input = tensor; }

  // The layer's result; its gradient comes from the next layer.
  void SetOutput(int tensor) {
    graph_.output = tensor;
    if (!needs_grad_[tensor]) return;
    graph_.output_grad = MatrixLike(tensor);
    grad_[tensor] = graph_.output_grad;
  }

  // A kernel from `input` to a new tensor of rows x width, which selective
  // recompute may run again; the backward reads the gradient and, where
  // `saves_input`, the input.
  int Elementwise(MemoryOpKind kind, int input, RowKind rows, int64_t width,
                  bool saves_input) {
    const int output = Matrix(rows, width, needs_grad_[input]);
    cheap_.push_back(AddElementwise(kind, BytesOf({input, output}),
                                    {{input}, {output}}, kForwardOnly));
    if (needs_grad_[output]) {
      backward_.push_back([=, this] {
        const int gradient = MatrixLike(input);
        const int output_grad = grad_[output];
        if (saves_input) {
          AddElementwise(kind, BytesOf({output_grad, input, gradient}),
                         {{output_grad, input}, {gradient}}, kForInput);
        } else {
          AddElementwise(kind, BytesOf({output_grad, gradient}),
                         {{output_grad}, {gradient}}, kForInput);
        }
        AddGrad(input, gradient);
      });
    }
    return output;
  }

  int Norm(int input) {
    return Elementwise(MemoryOpKind::kNorm, input, RowKind::kShard,
                       layer_.hidden_size, true);
  }

  // The norm's result scaled and shifted; the scale's gradient needs it again.
  int Modulate(int input) {
    return Elementwise(MemoryOpKind::kAdd, input, RowKind::kShard,
                       layer_.hidden_size, weight_grad_);
  }

  // Rotary embedding of queries and keys, `width` wide, or norms of them.
  int Rotate(int input, RowKind rows, int64_t width) {
    const ByteRule bytes = MatrixBytes(rows, 2 * width);
    const int output = MatrixLike(input, needs_grad_[input]);
    AddElementwise(MemoryOpKind::kRotary, bytes, {{input}, {output}},
                   kForwardOnly);
    if (needs_grad_[output]) {
      backward_.push_back([=, this] {
        const int gradient = MatrixLike(input);
        AddElementwise(MemoryOpKind::kRotary, bytes,
                       {{grad_[output]}, {gradient}}, kForInput);
        AddGrad(input, gradient);
      });
    }
    return output;
  }

  int Residual(int stream, int branch) {
    const int output = Matrix(RowKind::kShard, layer_.hidden_size,
                              needs_grad_[stream] || needs_grad_[branch]);
    AddElementwise(MemoryOpKind::kAdd, BytesOf({stream, branch, output}),
                   {{stream, branch}, {output}}, kForwardOnly);
    backward_.push_back([=, this] {
      for (const int tensor : {stream, branch}) {
        if (needs_grad_[tensor]) AddGrad(tensor, grad_[output]);
      }
    });
    return output;
  }

  double WeightBytes(int64_t in, int64_t out, int64_t bytes) const {
    return static_cast<double>(in) * static_cast<double>(out) *
           static_cast<double>(bytes);
  }

  // Tokens x in, held in shards, times in x out, divided by columns over the
  // tensor-parallel GPUs.
  int ColumnMatmul(int shard, int64_t in, int64_t all_columns) {
    constexpr RowKind rows = RowKind::kTokens;
    const int64_t out = CeilDiv(all_columns, tp_);
    const double weights = WeightBytes(in, out, element_);
    int input = shard;
    if (tp_ > 1) {
      input = Matrix(rows, in);
      AddCollective(CollectiveOpKind::kAllGather, shard, input, input,
                    kForwardOnly);
    }
    const bool input_wanted = needs_grad_[shard];
    const int output = Matrix(rows, out, input_wanted || weight_grad_);
    AddMatmul(rows, in, out, weights, {{input}, {output}}, kForwardOnly);
    backward_.push_back([=, this] {
      const int output_grad = grad_[output];
      int operand = shard;
      if (weight_grad_ && tp_ > 1) {
        operand = Matrix(rows, in);
        AddCollective(CollectiveOpKind::kAllGather, shard, operand, operand,
                      kForWeight);
      }
      if (input_wanted) {
        int gradient = Matrix(rows, in);
        AddMatmul(rows, out, in, weights, {{output_grad}, {gradient}},
                  kForInput);
        if (tp_ > 1) {
          const int whole = gradient;
          gradient = MatrixLike(shard);
          AddCollective(CollectiveOpKind::kReduceScatter, whole, gradient,
                        whole, kForInput);
        }
        AddGrad(shard, gradient);
      }
      if (weight_grad_) {
        AddWeightGrad(in, rows, out, operand, output_grad);
      }
    });
    return output;
  }

  // Tokens x in, divided by columns, times in x out, divided by rows; the sum
  // is left in shards.
  int RowMatmul(int input, int64_t all_in, int64_t out, MatmulRole matmul) {
    constexpr RowKind rows = RowKind::kTokens;
    const int64_t in = CeilDiv(all_in, tp_);
    const double weights = WeightBytes(in, out, element_);
    const bool input_wanted = needs_grad_[input];
    const bool needs_grad = input_wanted || weight_grad_;
    int output = Matrix(rows, out, needs_grad);
    AddMatmul(rows, in, out, weights, {{input}, {output}}, kForwardOnly,
              matmul);
    if (tp_ > 1) {
      const int whole = output;
      output = Matrix(RowKind::kShard, out, needs_grad);
      AddCollective(CollectiveOpKind::kReduceScatter, whole, output, whole,
                    kForwardOnly);
    }
    backward_.push_back([=, this] {
      int output_grad = grad_[output];
      if (tp_ > 1) {
        const int whole = Matrix(rows, out);
        AddCollective(CollectiveOpKind::kAllGather, output_grad, whole, whole,
                      !weight_grad_  ? kForInput
                      : input_wanted ? kForBoth
                                     : kForWeight);
        output_grad = whole;
      }
      if (input_wanted) {
        const int gradient = MatrixLike(input);
        AddMatmul(rows, out, in, weights, {{output_grad}, {gradient}},
                  kForInput);
        AddGrad(input, gradient);
      }
      if (weight_grad_) {
        AddWeightGrad(in, rows, out, input, output_grad);
      }
    });
    return output;
  }

  void AddAttention(const OpRule& rule, OpTensors tensors, Role role) {
    Op op;
    op.kind = OpKind::kAttention;
    Add(op, rule, std::move(tensors), role);
  }
  void AddHop(int from, int to, Role role) {
    Op op;
    op.kind = OpKind::kRingTransfer;
    op.stream = Stream::kContextParallel;
    OpRule rule;
    rule.bytes = BytesOf({to});
    Add(op, rule, {{from}, {to}}, role);
  }

  // `queries` with its heads divided over the tensor-parallel GPUs; keys and
  // values, of `key_rows`, are part of `queries` or, for the condition's, stand
  // in `keys`.
  int Attention(int queries, int keys, RowKind key_rows) {
    const int64_t width = CeilDiv(layer_.hidden_size, tp_);
    const int64_t key_width = CeilDiv(2 * KeyValueWidth(layer_), tp_);
    const bool needs_grad = needs_grad_[queries] || needs_grad_[keys];
    const int output = Matrix(RowKind::kTokens, width, needs_grad);
    // Logarithms of the rows' sums.
    const int sums = Tensor(
        PerRow(RowKind::kTokens,
               static_cast<double>(CeilDiv(layer_.heads, tp_) * kFp32Bytes)));
    OpRule rule;
    rule.width = static_cast<double>(width);
    rule.of_condition = key_rows == RowKind::kCondition;
    const auto hop = [this, key_rows, key_width] {
      return Matrix(key_rows, key_width);
    };
    {
      rule.bytes = BytesOf({output, output}) + MatrixBytes(key_rows, key_width);
      int block = keys;
      for (int64_t i = 0; i < cp_; ++i) {
        int next = -1;
        if (i + 1 < cp_) AddHop(block, next = hop(), kForwardOnly);
        AddAttention(rule, {{queries, block}, {output, sums}}, kForwardOnly);
        block = next;
      }
    }
    if (!needs_grad) return output;
    backward_.push_back([=, this] {
      const int output_grad = grad_[output];
      const int query_grad = MatrixLike(queries);
      const int key_grad = keys == queries ? query_grad : MatrixLike(keys);
      OpRule backward = rule;
      backward.factor = kFlashBackwardFactor;
      backward.bytes = BytesOf({output, output_grad, queries, query_grad});
      if (keys != queries) backward.bytes += BytesOf({keys, key_grad});
      int block = keys;
      int block_grad = key_grad;
      for (int64_t i = 0; i < cp_; ++i) {
        int next = -1;
        if (i + 1 < cp_) AddHop(block, next = hop(), kForInput);
        OpTensors tensors = {{queries, block, output, output_grad, sums},
                             {query_grad}};
        if (block_grad != query_grad) tensors.writes.push_back(block_grad);
        AddAttention(backward, std::move(tensors), kForInput);
        block = next;
        if (i + 1 < cp_) {
          const int next_grad = hop();
          AddHop(block_grad, next_grad, kForInput);
          block_grad = next_grad;
        }
      }
      AddGrad(queries, query_grad);
      if (keys != queries && needs_grad_[keys]) AddGrad(keys, key_grad);
    });
    return output;
  }

  // Keys and values of the condition, whose rows all GPUs hold; its gradient is
  // summed over the tensor-parallel GPUs.
  int ConditionKeys(int condition) {
    constexpr RowKind rows = RowKind::kCondition;
    const int64_t h = layer_.hidden_size;
    const int64_t out = CeilDiv(2 * KeyValueWidth(layer_), tp_);
    const double weights = WeightBytes(h, out, element_);
    const bool needs_grad = weight_grad_ || input_grad_;
    const int keys = Matrix(rows, out, needs_grad);
    AddMatmul(rows, h, out, weights, {{condition}, {keys}}, kForwardOnly);
    backward_.push_back([=, this] {
      if (input_grad_) {
        const int gradient = Matrix(rows, h);
        AddMatmul(rows, out, h, weights, {{grad_[keys]}, {gradient}},
                  kForInput);
        if (tp_ > 1) {
          AddCollective(CollectiveOpKind::kAllReduce, gradient, gradient,
                        gradient, kForInput);
        }
      }
      if (weight_grad_) {
        AddWeightGrad(h, rows, out, condition, grad_[keys]);
      }
    });
    return keys;
  }

  void Block() {
    const int64_t h = layer_.hidden_size;
    const int64_t kv = KeyValueWidth(layer_);
    const int64_t f = layer_.ffn_size;
    const int64_t gates = layer_.gated_ffn ? 2 : 1;
    const bool dit = layer_.kind == LayerKind::kDit;

    int x = Matrix(RowKind::kShard, h, input_grad_);
    SetInput(x);

    int y = Norm(x);
    if (dit) y = Modulate(y);
    y = ColumnMatmul(y, h, h + 2 * kv);
    y = Rotate(y, RowKind::kTokens, CeilDiv(h + kv, tp_));
    y = Attention(y, y, RowKind::kTokens);
    y = RowMatmul(y, h, h, MatmulRole::kAttentionOutput);
    x = Residual(x, y);

    if (dit) {
      y = ColumnMatmul(Norm(x), h, h);
      const int keys = ConditionKeys(Tensor({}));
      y = Attention(y, keys, RowKind::kCondition);
      y = RowMatmul(y, h, h, MatmulRole::kAttentionOutput);
      x = Residual(x, y);
    }

    y = Norm(x);
    if (dit) y = Modulate(y);
    y = ColumnMatmul(y, h, gates * f);
    y = Elementwise(MemoryOpKind::kActivation, y, RowKind::kTokens,
                    CeilDiv(f, tp_), true);
    y = RowMatmul(y, f, h, MatmulRole::kFfnDown);
    SetOutput(Residual(x, y));
  }

  // The vocabulary is divided over the tensor-parallel GPUs: each writes the
  // rows it has, the sum is left in shards.
  void Embedding() {
    const int64_t h = layer_.hidden_size;
    const int ids = Tensor(PerRow(RowKind::kTokens, kTokenIdBytes));
    SetInput(ids);
    const bool needs_grad = weight_grad_;
    const int rows = Matrix(RowKind::kTokens, h, needs_grad);
    AddElementwise(MemoryOpKind::kEmbedding, BytesOf({rows, rows}),
                   {{ids}, {rows}}, kForwardOnly);
    int output = rows;
    if (tp_ > 1) {
      output = Matrix(RowKind::kShard, h, needs_grad);
      AddCollective(CollectiveOpKind::kReduceScatter, rows, output, rows,
                    kForwardOnly);
    }
    SetOutput(output);
    if (!needs_grad) return;
    backward_.push_back([=, this] {
      int gradient = grad_[output];
      if (tp_ > 1) {
        const int whole = MatrixLike(rows);
        AddCollective(CollectiveOpKind::kAllGather, gradient, whole, whole,
                      kForWeight);
        gradient = whole;
      }
      AddElementwise(
          MemoryOpKind::kEmbedding,
          BytesOf({gradient}) +
              PerRow(RowKind::kTokens, WeightBytes(1, h, kWeightGradBytes)),
          {{gradient, ids}, {}}, kForWeight);
    });
  }

  // Ends in the loss, where the gradient begins. Probabilities are kept in
  // fp32.
  void LmHead() {
    const int64_t h = layer_.hidden_size;
    const int x = Matrix(RowKind::kShard, h, input_grad_);
    SetInput(x);
    const int logits = ColumnMatmul(x, h, layer_.vocab_size);
    if (!needs_grad_[logits]) {
      AddElementwise(MemoryOpKind::kActivation, BytesOf({logits}),
                     {{logits}, {}}, kForwardOnly);
      return;
    }
    const int probabilities = Tensor(PerRow(
        RowKind::kTokens,
        static_cast<double>(CeilDiv(layer_.vocab_size, tp_) * kFp32Bytes)));
    AddElementwise(MemoryOpKind::kActivation, BytesOf({logits, probabilities}),
                   {{logits}, {probabilities}}, kForwardOnly);
    backward_.push_back([=, this] {
      const int gradient = MatrixLike(logits);
      AddElementwise(MemoryOpKind::kActivation,
                     BytesOf({probabilities, gradient}),
                     {{probabilities}, {gradient}}, kForInput);
      AddGrad(logits, gradient);
    });
  }

  // Each GPU embeds the patches of its own shard.
  void PatchEmbed() {
    const int64_t in = layer_.input_size;
    const int64_t out = layer_.hidden_size;
    const int patches = Matrix(RowKind::kShard, in);
    SetInput(patches);
    const int output = Matrix(RowKind::kShard, out, weight_grad_);
    AddMatmul(RowKind::kShard, in, out, WeightBytes(in, out, element_),
              {{patches}, {output}}, kForwardOnly);
    SetOutput(output);
    if (!weight_grad_) return;
    backward_.push_back([=, this] {
      AddWeightGrad(in, RowKind::kShard, out, patches, grad_[output]);
    });
  }

  void Projector() {
    const int64_t h = layer_.hidden_size;
    const int64_t f = layer_.ffn_size;
    const int x = Matrix(RowKind::kShard, h, input_grad_);
    SetInput(x);
    int y = ColumnMatmul(x, h, f);
    y = Elementwise(MemoryOpKind::kActivation, y, RowKind::kTokens,
                    CeilDiv(f, tp_), true);
    SetOutput(RowMatmul(y, f, layer_.input_size, MatmulRole::kFfnDown));
  }

  // From who writes what: what the backward reads of the forward, and which of
  // it selective recompute leaves out.
  void FindSaved() {
    const size_t tensors = graph_.tensor_bytes.size();
    std::vector<bool> from_forward(tensors, false);
    if (graph_.input >= 0) from_forward[graph_.input] = true;
    for (const int op : graph_.forward) {
      for (const int tensor : graph_.op_tensors[op].writes) {
        from_forward[tensor] = true;
      }
    }
    std::vector<bool> saved(tensors, false);
    for (const int op : graph_.backward) {
      for (const int tensor : graph_.op_tensors[op].reads) {
        if (from_forward[tensor]) saved[tensor] = true;
      }
    }
    for (size_t tensor = 0; tensor < tensors; ++tensor) {
      if (saved[tensor]) graph_.saved.push_back(static_cast<int>(tensor));
    }
    // A cheap operation is worth its rebuilding where its result is saved and
    // its operands are there anyway.
    std::vector<bool> rebuilt(tensors, false);
    for (const int op : cheap_) {
      const OpTensors& cheap = graph_.op_tensors[op];
      const auto there = [&saved](int tensor) { return saved[tensor]; };
      if (saved[cheap.writes[0]] &&
          std::all_of(cheap.reads.begin(), cheap.reads.end(), there)) {
        rebuilt[cheap.writes[0]] = true;
        graph_.rebuilds.push_back(op);
      }
    }
    for (const int tensor : graph_.saved) {
      if (!rebuilt[tensor]) graph_.saved_selectively.push_back(tensor);
    }
    for (const int tensor : graph_.saved) {
      Op copy;
      copy.kind = OpKind::kHostCopy;
      copy.stream = Stream::kToHost;
      graph_.copies.push_back(static_cast<int>(graph_.ops.size()));
      graph_.ops.push_back(copy);
      graph_.op_tensors.push_back({{tensor}, {}});
      template_.op_rules.push_back({.bytes = BytesOf({tensor})});
    }
  }

  const LayerSpec& layer_;
  const bool weight_grad_;
  const bool input_grad_;
  const int64_t tp_;
  const int64_t cp_;
  const int64_t element_;  // bytes

  LayerTemplate template_;
  LayerGraph& graph_;             // of template_
  std::vector<bool> needs_grad_;  // [tensor]
  std::vector<int> grad_;         // [tensor]: its gradient's tensor, or -1
  std::vector<int> cheap_;        // forward operations
  std::vector<std::function<void()>> backward_;
};

// What the weight gradients read of earlier passes.
std::vector<int> WeightGradInputs(const LayerGraph& graph) {
  std::vector<bool> seen(graph.tensor_bytes.size(), false);
  std::vector<int> inputs;
  for (const int op : graph.weight_grads) {
    for (const int tensor : graph.op_tensors[op].reads) {
      if (!seen[tensor]) inputs.push_back(tensor);
      seen[tensor] = true;
    }
    for (const int tensor : graph.op_tensors[op].writes) seen[tensor] = true;
  }
  return inputs;
}

void Append(const std::vector<int>& from, std::vector<int>* to) {
  to->insert(to->end(), from.begin(), from.end());
}

// The operations that bring back what was not kept.
const std::vector<int>& Recomputed(const LayerGraph& graph,
                                   MemoryStrategy strategy) {
  static const std::vector<int> kNone;
  const auto beyond_input = [&graph](int tensor) {
    return tensor != graph.input;
  };
  switch (strategy) {
    case MemoryStrategy::kSelectiveRecompute:
      return graph.rebuilds;
    case MemoryStrategy::kFullRecompute:
      return std::any_of(graph.saved.begin(), graph.saved.end(), beyond_input)
                 ? graph.forward
                 : kNone;
    case MemoryStrategy::kOffload:
    case MemoryStrategy::kKeep:
      return kNone;
  }
  PW_CHECK(false && "unknown memory strategy");
}

}  // namespace

LayerTemplate ExpandTemplate(const Platform& platform, const LayerSpec& layer,
                             bool weight_grad, bool input_grad) {
  return Expander(platform, layer, weight_grad, input_grad).Run();
}

LayerGraph ExpandLayer(const Platform& platform, const LayerQuery& query) {
  return ExpandTemplate(platform, query.layer, query.weight_grad,
                        query.input_grad)
      .GraphAt(query.shape);
}

std::vector<int> KeptTensors(const LayerGraph& graph, MemoryStrategy strategy) {
  switch (strategy) {
    case MemoryStrategy::kOffload:
      return {};
    case MemoryStrategy::kFullRecompute:
      if (graph.saved.empty()) return {};
      return {graph.input};
    case MemoryStrategy::kSelectiveRecompute:
      return graph.saved_selectively;
    case MemoryStrategy::kKeep:
      return graph.saved;
  }
  PW_CHECK(false && "unknown memory strategy");
}

Pass PassOf(const LayerGraph& graph, PassKind kind, MemoryStrategy strategy) {
  Pass pass;
  switch (kind) {
    case PassKind::kForward:
      pass.ops = graph.forward;
      pass.inputs = {graph.input};
      pass.results = KeptTensors(graph, strategy);
      if (graph.output >= 0) pass.results.push_back(graph.output);
      break;
    case PassKind::kInputGrad:
    case PassKind::kBackward:
      pass.ops = Recomputed(graph, strategy);
      Append(kind == PassKind::kBackward ? graph.backward : graph.input_grads,
             &pass.ops);
      pass.inputs = KeptTensors(graph, strategy == MemoryStrategy::kOffload
                                           ? MemoryStrategy::kKeep
                                           : strategy);
      if (graph.output_grad >= 0) pass.inputs.push_back(graph.output_grad);
      if (kind == PassKind::kInputGrad) pass.results = WeightGradInputs(graph);
      if (graph.input_grad >= 0) pass.results.push_back(graph.input_grad);
      break;
    case PassKind::kWeightGrad:
      pass.ops = graph.weight_grads;
      pass.inputs = WeightGradInputs(graph);
      break;
    case PassKind::kOffload:
      pass.ops = graph.copies;
      pass.inputs = graph.saved;
      break;
  }
  return pass;
}

}  // namespace pipeweaver::semu
