// How well the op rules predict models they were not fitted on.

#include "semu/cost/ops/op_accuracy.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "semu/base/status_macros.h"
#include "semu/cost/ops/op_fit.h"

namespace pipeweaver::semu {
namespace {

// Sums first, means at the end.
void Add(double relative_error, ErrorStats* stats) {
  ++stats->count;
  stats->mean += std::abs(relative_error);
  stats->bias += relative_error;
  stats->max = std::max(stats->max, std::abs(relative_error));
}

void Finish(ErrorStats* stats) {
  if (stats->count == 0) return;
  stats->mean /= static_cast<double>(stats->count);
  stats->bias /= static_cast<double>(stats->count);
}

}  // namespace

absl::StatusOr<ModelAccuracy> MeasureAccuracy(
    const DeviceFactors& device, const std::vector<const OpRow*>& rows,
    int64_t min_tokens) {
  ModelAccuracy accuracy;
  accuracy.device = device.name;
  std::map<std::pair<std::string, int64_t>, ErrorStats> matmuls_by_tp;
  for (const OpRow* row : rows) {
    if (row->tokens < min_tokens) continue;
    double predicted_sum = 0;
    double measured_sum = 0;
    for (const OpCell& cell : row->cells) {
      if (!cell.measured_us || *cell.measured_us <= 0) continue;
      PW_ASSIGN_OR_RETURN(const double predicted, PredictUs(device, cell));
      const double error = predicted / *cell.measured_us - 1;
      Add(error, &accuracy.ops[cell.name]);
      if (std::holds_alternative<MatmulOp>(cell.op)) {
        Add(error, &matmuls_by_tp[{cell.name, row->tp}]);
      }
      predicted_sum += predicted;
      measured_sum += *cell.measured_us;
    }
    if (measured_sum > 0)
      Add(predicted_sum / measured_sum - 1, &accuracy.layer);
  }
  Finish(&accuracy.layer);
  for (auto& [name, stats] : accuracy.ops) Finish(&stats);
  for (auto& [key, stats] : matmuls_by_tp) {
    Finish(&stats);
    accuracy.worst_matmul_mean =
        std::max(accuracy.worst_matmul_mean, stats.mean);
  }
  return accuracy;
}

absl::StatusOr<std::vector<ModelAccuracy>> LeaveOneModelOut(
    const std::vector<const OpRow*>& rows, int64_t min_tokens) {
  std::map<std::string, std::set<std::string>> models;
  for (const OpRow* row : rows) {
    if (!row->model.empty()) models[row->device].insert(row->model);
  }
  std::vector<ModelAccuracy> result;
  for (const auto& [device, names] : models) {
    const DeviceFactors* start = FindDeviceFactors(device);
    if (start == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("device '", device, "' is not known"));
    }
    if (names.size() < 2) continue;
    for (const std::string& held_out : names) {
      std::vector<const OpRow*> fitted;
      std::vector<const OpRow*> held;
      for (const OpRow* row : rows) {
        if (row->device != device || row->model.empty()) continue;
        (row->model == held_out ? held : fitted).push_back(row);
      }
      PW_ASSIGN_OR_RETURN(
          ModelAccuracy accuracy,
          MeasureAccuracy(FitFactors(*start, fitted), held, min_tokens));
      accuracy.name = held_out;
      result.push_back(std::move(accuracy));
    }
  }
  return result;
}

}  // namespace pipeweaver::semu
