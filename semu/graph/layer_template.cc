// Sums are in double: below the bound they are exact.

#include "semu/graph/layer_template.h"

#include <algorithm>

namespace pipeweaver::semu {
namespace {

constexpr double kMaxBytes = 1e14;

using Rows = std::array<int64_t, kNumRowKinds>;  // [RowKind]

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

Rows RowsAt(const LayerTemplate& layer, const Shape& shape) {
  const int64_t tokens = CeilDiv(shape.tokens, layer.context_parallel);
  return {tokens, CeilDiv(tokens, layer.tensor_parallel),
          CeilDiv(shape.condition_tokens, layer.context_parallel)};
}

int64_t BytesAt(const ByteRule& rule, const Rows& rows) {
  double bytes = rule.fixed;
  for (int r = 0; r < kNumRowKinds; ++r) {
    bytes += rule.per_row[r] * static_cast<double>(rows[r]);
  }
  return static_cast<int64_t>(std::min(bytes, kMaxBytes));
}

}  // namespace

ByteRule& ByteRule::operator+=(const ByteRule& other) {
  fixed += other.fixed;
  for (int r = 0; r < kNumRowKinds; ++r) per_row[r] += other.per_row[r];
  return *this;
}

void LayerTemplate::SetOpsAt(const Shape& shape, std::vector<Op>* ops) const {
  const Rows rows = RowsAt(*this, shape);
  const double cp = static_cast<double>(context_parallel);
  const double pairs =
      static_cast<double>(shape.sum_squares) * (causal ? 0.5 : 1.0);
  const double condition_pairs = static_cast<double>(shape.condition_products);
  *ops = graph.ops;
  for (size_t i = 0; i < ops->size(); ++i) {
    Op& op = (*ops)[i];
    const OpRule& rule = op_rules[i];
    op.bytes = BytesAt(rule.bytes, rows);
    if (rule.row_dimension != nullptr) {
      op.*rule.row_dimension = rows[static_cast<int>(rule.rows)];
    }
    if (op.kind == OpKind::kMatmul) {
      op.flops = 2.0 * static_cast<double>(op.rows) *
                 static_cast<double>(op.inner) *
                 static_cast<double>(op.columns);
    } else if (op.kind == OpKind::kAttention) {
      const double all =
          4 * (rule.of_condition ? condition_pairs : pairs) / cp * rule.width;
      op.flops = rule.factor * all / cp;
    }
  }
}

LayerGraph LayerTemplate::GraphAt(const Shape& shape) const {
  LayerGraph at = graph;
  SetOpsAt(shape, &at.ops);
  const Rows rows = RowsAt(*this, shape);
  for (size_t i = 0; i < tensor_rules.size(); ++i) {
    at.tensor_bytes[i] = BytesAt(tensor_rules[i], rows);
  }
  return at;
}

}  // namespace pipeweaver::semu
