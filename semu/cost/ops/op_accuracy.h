// How well the op rules predict models they were not fitted on.

#ifndef SEMU_COST_OPS_OP_ACCURACY_H_
#define SEMU_COST_OPS_OP_ACCURACY_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "semu/cost/ops/op_factors.h"
#include "semu/cost/ops/op_table.h"

namespace pipeweaver::semu {

struct ErrorStats {
  int64_t count = 0;
  // Of |predicted / measured - 1|.
  double mean = 0;
  double max = 0;
  // Mean of predicted / measured - 1.
  double bias = 0;
};

struct ModelAccuracy {
  std::string device;
  // The model, or for collectives kind and workers.
  std::string name;
  // Sum of all ops of a row.
  ErrorStats layer;
  // By op.
  std::map<std::string, ErrorStats> ops;
  // Worst mean of any matmul at any one tensor-parallel degree.
  double worst_matmul_mean = 0;
};

// Errors of `device` on rows of at least `min_tokens`. Fails as PredictUs.
absl::StatusOr<ModelAccuracy> MeasureAccuracy(
    const DeviceFactors& device, const std::vector<const OpRow*>& rows,
    int64_t min_tokens);

// For every device and model in `rows`: factors fitted to the device's other
// models, errors on this one. Models in order of device and name. Devices must
// be known; those with one model only are left out.
absl::StatusOr<std::vector<ModelAccuracy>> LeaveOneModelOut(
    const std::vector<const OpRow*>& rows, int64_t min_tokens);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OPS_OP_ACCURACY_H_
