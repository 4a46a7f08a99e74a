// Efficiency factors of the roofline: what operations reach of a device's
// nominal figures where no rule was fitted to measurements.

#ifndef SEMU_COST_ROOFLINE_FACTORS_H_
#define SEMU_COST_ROOFLINE_FACTORS_H_

#include <array>

#include "absl/strings/string_view.h"
#include "semu/graph/op_graph.h"

namespace pipeweaver::semu {

// What an operation of a kind reaches of the device's figures, 0 .. 1.
struct OpFactors {
  double flops_efficiency = 1;
  double memory_efficiency = 1;
  double network_efficiency = 1;
  double launch_ns = 0;
};

using RooflineFactors = std::array<OpFactors, kNumOpKinds>;

// Factors for a device by name; those of Hopper GPUs for a name not known.
RooflineFactors DefaultFactors(absl::string_view device_name);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_ROOFLINE_FACTORS_H_
