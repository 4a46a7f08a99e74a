// How well the op cost rules predict real GPUs: for every model of the given
// tables, factors fitted to the device's other models, errors on this one; then
// the same for whole ranges of shapes left out, and for worker counts and sizes
// of collectives; and the collectives with factors fitted to them.
//
//   leave_one_out [--print_factors] TABLE.csv[.gz]...
//
// --print_factors writes the factors fitted to everything, as op_factors.cc
// holds.

#include <cstdio>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/base/text_source.h"
#include "semu/cost/ops/op_accuracy.h"
#include "semu/cost/ops/op_fit.h"
#include "semu/cost/ops/op_table.h"

namespace pipeweaver {
namespace {

constexpr int64_t kMinTokens = 1024;
constexpr int64_t kMinBytes = 1'000'000;
constexpr std::size_t kMaxTableBytes = 256 << 20;

using Rows = std::vector<const semu::OpRow*>;

// What is left out of a fit, and predicted.
struct HoldOut {
  std::string name;
  std::function<bool(const semu::OpRow&)> held;
};

const semu::CollectiveOp* CollectiveOf(const semu::OpRow& row) {
  return row.cells.empty() ? nullptr
                           : std::get_if<semu::CollectiveOp>(&row.cells[0].op);
}

int64_t HiddenSize(const semu::OpRow& row) {
  for (const semu::OpCell& cell : row.cells) {
    const auto* matmul = std::get_if<semu::MatmulOp>(&cell.op);
    if (matmul != nullptr && cell.name == "attn_pre_proj") return matmul->inner;
  }
  return 0;
}

// Ends of the range of shapes, beyond anything that is left to fit to.
std::vector<HoldOut> LayerHoldOuts() {
  return {
      {"hidden size above 4096",
       [](const semu::OpRow& row) { return HiddenSize(row) > 4096; }},
      {"hidden size below 8192",
       [](const semu::OpRow& row) { return HiddenSize(row) < 8192; }},
      {"tensor parallelism of 8",
       [](const semu::OpRow& row) { return row.tp == 8; }},
      {"tensor parallelism of 1",
       [](const semu::OpRow& row) { return row.tp == 1; }},
      {"tokens above 2048",
       [](const semu::OpRow& row) { return row.tokens > 2048; }},
      {"tokens below 2048",
       [](const semu::OpRow& row) { return row.tokens < 2048; }},
  };
}

std::vector<HoldOut> CollectiveHoldOuts() {
  std::vector<HoldOut> hold_outs;
  for (const int workers : {2, 4, 8}) {
    hold_outs.push_back({absl::StrCat(workers, " workers of one node"),
                         [workers](const semu::OpRow& row) {
                           return CollectiveOf(row)->workers == workers;
                         }});
  }
  hold_outs.push_back({"bytes above 16 MB", [](const semu::OpRow& row) {
                         return CollectiveOf(row)->bytes > 16'000'000;
                       }});
  hold_outs.push_back({"bytes below 16 MB", [](const semu::OpRow& row) {
                         return CollectiveOf(row)->bytes < 16'000'000;
                       }});
  return hold_outs;
}

absl::Status PrintHoldOuts(const std::string& name, const Rows& rows,
                           const std::vector<HoldOut>& hold_outs) {
  const semu::DeviceFactors* device = semu::FindDeviceFactors(name);
  if (device == nullptr)
    return absl::InvalidArgumentError("unknown device " + name);
  for (const HoldOut& hold_out : hold_outs) {
    Rows fitted;
    Rows held;
    for (const semu::OpRow* row : rows) {
      (hold_out.held(*row) ? held : fitted).push_back(row);
    }
    if (fitted.empty() || held.empty()) continue;
    const absl::StatusOr<semu::ModelAccuracy> accuracy = semu::MeasureAccuracy(
        semu::FitFactors(*device, fitted), held,
        CollectiveOf(*held[0]) == nullptr ? kMinTokens : 0);
    if (!accuracy.ok()) return accuracy.status();
    std::printf("%s %-36s %.1f (%+.1f) worst %.1f", name.c_str(),
                hold_out.name.c_str(), 100 * accuracy->layer.mean,
                100 * accuracy->layer.bias, 100 * accuracy->layer.max);
    if (accuracy->worst_matmul_mean > 0)
      std::printf(" | worst matmul at one tp %.1f",
                  100 * accuracy->worst_matmul_mean);
    std::printf("\n");
  }
  return absl::OkStatus();
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "leave_one_out: %s\n",
               std::string(status.message()).c_str());
  return 1;
}

int Run(const std::vector<std::string>& paths, bool print_factors) {
  std::vector<semu::OpTable> tables;
  for (const std::string& path : paths) {
    const absl::StatusOr<std::string> text = ReadTextFile(path, kMaxTableBytes);
    if (!text.ok()) return Fail(text.status());
    absl::StatusOr<semu::OpTable> table = semu::ParseOpTable(*text);
    if (!table.ok()) {
      return Fail(absl::InvalidArgumentError(
          absl::StrCat(path, ": ", table.status().message())));
    }
    tables.push_back(*std::move(table));
  }
  std::vector<const semu::OpRow*> rows;
  std::map<std::string, std::vector<const semu::OpRow*>> by_device;
  for (const semu::OpTable& table : tables) {
    for (const semu::OpRow& row : table.rows) {
      rows.push_back(&row);
      by_device[row.device].push_back(&row);
    }
  }

  if (print_factors) {
    for (const auto& [name, device_rows] : by_device) {
      const semu::DeviceFactors* start = semu::FindDeviceFactors(name);
      if (start == nullptr)
        return Fail(absl::InvalidArgumentError("unknown device " + name));
      const semu::DeviceFactors fitted = semu::FitFactors(*start, device_rows);
      std::printf("%s\n", semu::FactorsSource(fitted).c_str());
    }
    return 0;
  }

  const absl::StatusOr<std::vector<semu::ModelAccuracy>> models =
      semu::LeaveOneModelOut(rows, kMinTokens);
  if (!models.ok()) return Fail(models.status());
  std::printf("Not in the fit, %ld tokens and more: mean |error| (bias), %%\n",
              static_cast<long>(kMinTokens));
  for (const semu::ModelAccuracy& model : *models) {
    std::printf(
        "%s %-16s layer %.1f (%+.1f) worst %.1f | worst matmul at one tp %.1f "
        "|",
        model.device.c_str(), model.name.c_str(), 100 * model.layer.mean,
        100 * model.layer.bias, 100 * model.layer.max,
        100 * model.worst_matmul_mean);
    for (const auto& [op, stats] : model.ops) {
      std::printf(" %s %.1f (%+.1f)", op.c_str(), 100 * stats.mean,
                  100 * stats.bias);
    }
    std::printf("\n");
  }

  std::printf("Ranges not in the fit, %ld tokens and more:\n",
              static_cast<long>(kMinTokens));
  for (const auto& [name, device_rows] : by_device) {
    Rows layers;
    for (const semu::OpRow* row : device_rows) {
      if (!row->model.empty()) layers.push_back(row);
    }
    const absl::Status status = PrintHoldOuts(name, layers, LayerHoldOuts());
    if (!status.ok()) return Fail(status);
  }
  std::printf("All-reduce inside a node, 1 MB and more, not in the fit:\n");
  for (const auto& [name, device_rows] : by_device) {
    Rows collectives;
    for (const semu::OpRow* row : device_rows) {
      const semu::CollectiveOp* op = CollectiveOf(*row);
      if (op != nullptr && op->kind == semu::CollectiveOpKind::kAllReduce &&
          op->devices_per_node == op->workers && op->bytes >= kMinBytes) {
        collectives.push_back(row);
      }
    }
    const absl::Status status =
        PrintHoldOuts(name, collectives, CollectiveHoldOuts());
    if (!status.ok()) return Fail(status);
  }

  std::printf(
      "Collectives of 1 MB and more, default factors: mean |error| (bias), "
      "worst, %%\n");
  for (const auto& [name, device_rows] : by_device) {
    const semu::DeviceFactors* device = semu::FindDeviceFactors(name);
    if (device == nullptr)
      return Fail(absl::InvalidArgumentError("unknown device " + name));
    std::map<std::string, std::vector<const semu::OpRow*>> groups;
    for (const semu::OpRow* row : device_rows) {
      if (row->cells.empty()) continue;
      const auto* op = std::get_if<semu::CollectiveOp>(&row->cells[0].op);
      if (op == nullptr || op->bytes < kMinBytes) continue;
      groups[absl::StrCat(op->kind == semu::CollectiveOpKind::kSendReceive
                              ? "send_recv"
                              : "all_reduce",
                          " ", op->workers, " workers, ", op->devices_per_node,
                          " a node")]
          .push_back(row);
    }
    for (const auto& [group, group_rows] : groups) {
      const absl::StatusOr<semu::ModelAccuracy> accuracy =
          semu::MeasureAccuracy(*device, group_rows, 0);
      if (!accuracy.ok()) return Fail(accuracy.status());
      std::printf("%s %-36s %.1f (%+.1f) worst %.1f\n", name.c_str(),
                  group.c_str(), 100 * accuracy->layer.mean,
                  100 * accuracy->layer.bias, 100 * accuracy->layer.max);
    }
  }
  return 0;
}

}  // namespace
}  // namespace pipeweaver

int main(int argc, char** argv) {
  std::vector<std::string> paths(argv + 1, argv + argc);
  const bool print_factors = !paths.empty() && paths[0] == "--print_factors";
  if (print_factors) paths.erase(paths.begin());
  if (paths.empty()) {
    std::fprintf(stderr,
                 "usage: leave_one_out [--print_factors] TABLE.csv[.gz]...\n");
    return 2;
  }
  return pipeweaver::Run(paths, print_factors);
}
