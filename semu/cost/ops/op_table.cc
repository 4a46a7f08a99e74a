// Tables of measured op times as CSV.

#include "semu/cost/ops/op_table.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "semu/base/status_macros.h"
#include "semu/cost/ops/op_rules.h"

namespace pipeweaver::semu {
namespace {

// Keeps every product of three sizes within int64.
constexpr int64_t kMaxSize = 1'000'000;
constexpr int64_t kMaxBytes = 1'000'000'000'000'000;
constexpr int64_t kBytesPerElement = 2;

class RowReader {
 public:
  RowReader(std::size_t line, const std::map<std::string, std::size_t>& columns,
            const std::vector<std::string>& cells)
      : line_(line), columns_(columns), cells_(cells) {}

  bool Has(const std::string& column) const {
    return columns_.contains(column);
  }

  const std::string& Text(const std::string& column) const {
    return cells_[columns_.find(column)->second];
  }

  absl::StatusOr<int64_t> Size(const std::string& column, int64_t max) const {
    int64_t value = 0;
    if (!absl::SimpleAtoi(Text(column), &value) || value < 1 || value > max) {
      return Error(column, absl::StrCat("must be an integer from 1 to ", max));
    }
    return value;
  }

  absl::StatusOr<bool> Boolean(const std::string& column) const {
    const std::string text = absl::AsciiStrToLower(Text(column));
    if (text == "true" || text == "1") return true;
    if (text == "false" || text == "0") return false;
    return Error(column, "must be True or False");
  }

  absl::StatusOr<std::optional<double>> Time(const std::string& column) const {
    const absl::string_view text = absl::StripAsciiWhitespace(Text(column));
    if (text.empty() || absl::EqualsIgnoreCase(text, "nan"))
      return std::optional<double>();
    double value = 0;
    if (!absl::SimpleAtod(text, &value) || !std::isfinite(value) || value < 0) {
      return Error(column,
                   "must be empty or a time in microseconds, at least 0");
    }
    return std::optional<double>(value);
  }

  absl::Status Error(const std::string& column, absl::string_view rule) const {
    return absl::InvalidArgumentError(absl::StrCat(
        "line ", line_, ": ", column, " '", Text(column), "' ", rule));
  }

 private:
  const std::size_t line_;
  const std::map<std::string, std::size_t>& columns_;
  const std::vector<std::string>& cells_;
};

bool IsTime(const std::string& column) { return absl::EndsWith(column, "_us"); }

absl::Status CheckColumns(const std::map<std::string, std::size_t>& columns,
                          const std::vector<std::string>& needed) {
  for (const std::string& column : needed) {
    if (!columns.contains(column)) {
      return absl::InvalidArgumentError(
          absl::StrCat("line 1: column ", column, " is missing"));
    }
  }
  return absl::OkStatus();
}

struct LayerShape {
  int64_t hidden, ffn, heads, kv_heads, tp, tokens;
  bool gated;
  // Attention and feed-forward part read the same input (no second norm), so
  // the residual takes both sums.
  bool parallel_block;
};

bool HasParallelBlock(absl::string_view model) {
  const std::string name = absl::AsciiStrToLower(model);
  return absl::StrContains(name, "phi-1") || absl::StrContains(name, "phi-2") ||
         absl::StrContains(name, "gpt-j") ||
         absl::StrContains(name, "falcon-7b");
}

absl::StatusOr<LayerShape> ReadLayerShape(const RowReader& row) {
  LayerShape shape;
  PW_ASSIGN_OR_RETURN(shape.hidden, row.Size("hidden", kMaxSize));
  PW_ASSIGN_OR_RETURN(shape.ffn, row.Size("ffn", kMaxSize));
  PW_ASSIGN_OR_RETURN(shape.heads, row.Size("heads", kMaxSize));
  PW_ASSIGN_OR_RETURN(shape.kv_heads, row.Size("kv_heads", kMaxSize));
  PW_ASSIGN_OR_RETURN(shape.tp, row.Size("tp", kMaxSize));
  PW_ASSIGN_OR_RETURN(shape.tokens, row.Size("tokens", kMaxSize));
  PW_ASSIGN_OR_RETURN(shape.gated, row.Boolean("gated"));
  if (shape.hidden % shape.heads != 0)
    return row.Error("heads", "must divide hidden");
  if (shape.kv_heads > shape.heads)
    return row.Error("kv_heads", "must be at most heads");
  if (shape.hidden % shape.tp != 0)
    return row.Error("tp", "must divide hidden");
  if (shape.ffn % shape.tp != 0) return row.Error("tp", "must divide ffn");
  PW_ASSIGN_OR_RETURN(shape.parallel_block,
                      row.Has("parallel_block")
                          ? row.Boolean("parallel_block")
                          : HasParallelBlock(row.Text("model")));
  return shape;
}

// The op behind a column; empty for an unknown one.
std::optional<std::variant<MatmulOp, MemoryOp, CollectiveOp>> LayerOp(
    const std::string& name, const LayerShape& s) {
  const int64_t head_size = s.hidden / s.heads;
  const auto memory = [](MemoryOpKind kind, int64_t elements) {
    return MemoryOp{kind, elements * kBytesPerElement};
  };
  if (name == "attn_pre_proj") {
    const int64_t columns =
        std::max<int64_t>((s.heads + 2 * s.kv_heads) * head_size / s.tp, 1);
    return MatmulOp{s.tokens, columns, s.hidden, MatmulRole::kGeneral};
  }
  if (name == "attn_post_proj") {
    return MatmulOp{s.tokens, s.hidden, s.hidden / s.tp,
                    MatmulRole::kAttentionOutput};
  }
  if (name == "mlp_up_proj") {
    return MatmulOp{s.tokens, (s.gated ? 2 : 1) * s.ffn / s.tp, s.hidden,
                    MatmulRole::kGeneral};
  }
  if (name == "mlp_down_proj") {
    return MatmulOp{s.tokens, s.hidden, s.ffn / s.tp, MatmulRole::kFfnDown};
  }
  if (name == "emb")
    return memory(MemoryOpKind::kEmbedding, 2 * s.tokens * s.hidden);
  if (name == "input_layernorm" || name == "post_attention_layernorm") {
    return memory(MemoryOpKind::kNorm, 2 * s.tokens * s.hidden);
  }
  if (name == "attn_rope") {
    return memory(MemoryOpKind::kRotary,
                  2 * s.tokens * (s.heads + s.kv_heads) * head_size / s.tp);
  }
  if (name == "mlp_act") {
    return memory(MemoryOpKind::kActivation,
                  (s.gated ? 3 : 2) * s.tokens * s.ffn / s.tp);
  }
  if (name == "add") {
    return memory(MemoryOpKind::kAdd,
                  (s.parallel_block ? 6 : 3) * s.tokens * s.hidden);
  }
  return std::nullopt;
}

}  // namespace

absl::StatusOr<OpTable> ParseOpTable(absl::string_view csv) {
  OpTable table;
  std::map<std::string, std::size_t> columns;
  bool collectives = false;
  std::size_t line_number = 0;
  for (absl::string_view line : absl::StrSplit(csv, '\n')) {
    ++line_number;
    line = absl::StripSuffix(line, "\r");
    if (line.empty()) continue;
    std::vector<std::string> cells = absl::StrSplit(line, ',');
    if (table.columns.empty()) {
      for (std::size_t i = 0; i < cells.size(); ++i) {
        if (!columns.emplace(cells[i], i).second) {
          return absl::InvalidArgumentError(absl::StrCat(
              "line ", line_number, ": column ", cells[i], " appears twice"));
        }
      }
      collectives = columns.contains("collective");
      PW_RETURN_IF_ERROR(
          collectives
              ? CheckColumns(columns,
                             {"system", "workers", "devices_per_node", "bytes"})
              : CheckColumns(columns, {"gpu", "model", "hidden", "ffn", "heads",
                                       "kv_heads", "gated", "tp", "tokens"}));
      table.columns = std::move(cells);
      continue;
    }
    if (cells.size() != table.columns.size()) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", line_number, " has ", cells.size(),
                       " cells, the header ", table.columns.size()));
    }
    const RowReader reader(line_number, columns, cells);
    OpRow row;
    row.line = line_number;
    LayerShape shape = {};
    CollectiveOp collective;
    if (collectives) {
      row.device = absl::AsciiStrToLower(
          absl::StripSuffix(reader.Text("system"), "_dgx"));
      const std::string& kind = reader.Text("collective");
      if (kind == "all_reduce") {
        collective.kind = CollectiveOpKind::kAllReduce;
      } else if (kind == "all_gather") {
        collective.kind = CollectiveOpKind::kAllGather;
      } else if (kind == "reduce_scatter") {
        collective.kind = CollectiveOpKind::kReduceScatter;
      } else if (kind == "send_recv") {
        collective.kind = CollectiveOpKind::kSendReceive;
      } else {
        return reader.Error(
            "collective",
            "must be all_reduce, all_gather, reduce_scatter or send_recv");
      }
      PW_ASSIGN_OR_RETURN(const int64_t workers,
                          reader.Size("workers", kMaxSize));
      PW_ASSIGN_OR_RETURN(const int64_t per_node,
                          reader.Size("devices_per_node", kMaxSize));
      collective.workers = static_cast<int>(workers);
      collective.devices_per_node = static_cast<int>(per_node);
      PW_ASSIGN_OR_RETURN(collective.bytes, reader.Size("bytes", kMaxBytes));
    } else {
      row.device = absl::AsciiStrToLower(reader.Text("gpu"));
      row.model = reader.Text("model");
      PW_ASSIGN_OR_RETURN(shape, ReadLayerShape(reader));
      row.tp = shape.tp;
      row.tokens = shape.tokens;
    }
    for (const std::string& column : table.columns) {
      if (!IsTime(column)) continue;
      OpCell cell;
      cell.name = column.substr(0, column.size() - 3);
      PW_ASSIGN_OR_RETURN(cell.measured_us, reader.Time(column));
      if (collectives) {
        cell.op = collective;
      } else {
        const auto op = LayerOp(cell.name, shape);
        if (!op) {
          return absl::InvalidArgumentError(
              absl::StrCat("line 1: ", column, " is no known op"));
        }
        cell.op = *op;
        cell.absent =
            shape.parallel_block && cell.name == "post_attention_layernorm";
      }
      row.cells.push_back(std::move(cell));
    }
    table.rows.push_back(std::move(row));
    table.text.push_back(std::move(cells));
  }
  if (table.columns.empty())
    return absl::InvalidArgumentError("the table has no header");
  return table;
}

absl::StatusOr<double> PredictUs(const DeviceFactors& device,
                                 const OpCell& cell) {
  if (const auto* matmul = std::get_if<MatmulOp>(&cell.op)) {
    return MatmulUs(device, matmul->rows, matmul->columns, matmul->inner,
                    matmul->role);
  }
  if (const auto* memory = std::get_if<MemoryOp>(&cell.op)) {
    return MemoryOpUs(device, memory->kind, memory->bytes);
  }
  const auto& collective = std::get<CollectiveOp>(cell.op);
  return CollectiveUs(device, collective.kind, collective.workers,
                      collective.devices_per_node, collective.bytes);
}

absl::StatusOr<std::string> PredictOpTable(absl::string_view csv) {
  PW_ASSIGN_OR_RETURN(OpTable table, ParseOpTable(csv));
  std::string out = absl::StrCat(absl::StrJoin(table.columns, ","), "\n");
  const bool collectives = std::find(table.columns.begin(), table.columns.end(),
                                     "collective") != table.columns.end();
  for (std::size_t r = 0; r < table.rows.size(); ++r) {
    const OpRow& row = table.rows[r];
    const DeviceFactors* device = FindDeviceFactors(row.device);
    if (device == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", row.line, ": ", collectives ? "system" : "gpu",
                       " '", row.device, "' has no fitted factors; known: ",
                       absl::StrJoin(KnownDevices(), ", ")));
    }
    const bool any_measured =
        std::any_of(row.cells.begin(), row.cells.end(),
                    [](const OpCell& c) { return c.measured_us.has_value(); });
    std::size_t next_cell = 0;
    for (std::size_t c = 0; c < table.columns.size(); ++c) {
      if (!IsTime(table.columns[c])) continue;
      const OpCell& cell = row.cells[next_cell++];
      table.text[r][c].clear();
      if (any_measured && !cell.measured_us) continue;
      if (cell.absent) continue;
      const absl::StatusOr<double> us = PredictUs(*device, cell);
      if (!us.ok()) {
        return absl::Status(
            us.status().code(),
            absl::StrCat("line ", row.line, ": ", us.status().message()));
      }
      table.text[r][c] = absl::StrFormat("%.3f", *us);
    }
    absl::StrAppend(&out, absl::StrJoin(table.text[r], ","), "\n");
  }
  return out;
}

}  // namespace pipeweaver::semu
