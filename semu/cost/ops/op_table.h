// Tables of measured op times as CSV, read into shapes that the op rules
// understand, and written back with other times.
//
// Two kinds, told by their columns:
//   model, gpu, hidden, ffn, heads, kv_heads, vocab, gated, tp, tokens, *_us:
//   the ops of a transformer layer's forward pass under tensor parallelism;
//   system, collective, workers, devices_per_node, bytes, *_us: collectives.
// In layer tables a column parallel_block (True or False) says that attention
// and feed-forward part read the same input, through one norm: the residual
// takes both sums, and there is no second norm. Without that column it holds of
// the models that are known to be built so (phi-1, phi-2, GPT-J, Falcon-7B).
// Shapes per GPU: query/key/value hidden x (heads + 2 kv_heads) head_dim / tp,
// output hidden / tp x hidden, up hidden x (2 if gated) ffn / tp, down ffn / tp
// x hidden. 16 bit.

#ifndef SEMU_COST_OPS_OP_TABLE_H_
#define SEMU_COST_OPS_OP_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "semu/cost/ops/op_factors.h"

namespace pipeweaver::semu {

struct MatmulOp {
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t inner = 0;
  MatmulRole role = MatmulRole::kGeneral;
};

struct MemoryOp {
  MemoryOpKind kind = MemoryOpKind::kAdd;
  int64_t bytes = 0;
};

struct CollectiveOp {
  CollectiveOpKind kind = CollectiveOpKind::kAllReduce;
  int workers = 0;
  int devices_per_node = 0;
  int64_t bytes = 0;
};

// One time of a table.
struct OpCell {
  // Column without "_us": "mlp_up_proj".
  std::string name;
  std::variant<MatmulOp, MemoryOp, CollectiveOp> op;
  // Empty where the table has none.
  std::optional<double> measured_us;
  // The model has no such op.
  bool absent = false;
};

struct OpRow {
  // In the text, from 1 on.
  std::size_t line = 0;
  // Name of the device's factors: "h100".
  std::string device;
  // Empty for collectives.
  std::string model;
  int64_t tp = 0;
  int64_t tokens = 0;
  std::vector<OpCell> cells;
};

struct OpTable {
  std::vector<std::string> columns;
  // The text of every cell, by row and column.
  std::vector<std::vector<std::string>> text;
  std::vector<OpRow> rows;
};

// Reads a table. INVALID_ARGUMENT names line, column, value and rule.
absl::StatusOr<OpTable> ParseOpTable(absl::string_view csv);

// Microseconds by the rules. NOT_FOUND as CollectiveUs.
absl::StatusOr<double> PredictUs(const DeviceFactors& device,
                                 const OpCell& cell);

// The table with predicted times in microseconds, three decimals, in place of
// the measured ones, all else as it was; the measured ones do not count. A cell
// stays empty where the model has no such op: the second norm of a parallel
// block, and one that is empty while the row has other times. INVALID_ARGUMENT
// for a device without factors, NOT_FOUND as CollectiveUs, both naming the
// line.
absl::StatusOr<std::string> PredictOpTable(absl::string_view csv);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OPS_OP_TABLE_H_
