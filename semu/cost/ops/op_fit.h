// Fits the op rules' factors to measured ops of one device.

#ifndef SEMU_COST_OPS_OP_FIT_H_
#define SEMU_COST_OPS_OP_FIT_H_

#include <string>
#include <vector>

#include "semu/cost/ops/op_factors.h"
#include "semu/cost/ops/op_table.h"

namespace pipeweaver::semu {

// Factors that fit the measured cells of `rows`, robustly and by relative
// error. `start` gives the device's nominal figures, where the search begins,
// and the factors of what `rows` do not measure. Only times count: models and
// parallelism are not looked at. Collectives are fitted from 1 MB on, shorter
// ones being ruled by protocol switches. Deterministic; seconds for some
// thousand rows.
DeviceFactors FitFactors(const DeviceFactors& start,
                         const std::vector<const OpRow*>& rows);

// `factors` as the C++ initializer that op_factors.cc holds.
std::string FactorsSource(const DeviceFactors& factors);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OPS_OP_FIT_H_
