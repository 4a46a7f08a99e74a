// Measured points of a profile, from imported traces.

#ifndef PROFILER_PROFILE_BUILDER_H_
#define PROFILER_PROFILE_BUILDER_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/profile.pb.h"
#include "profiler/trace_import.h"

namespace pipeweaver::profiler {

struct ProfileInput {
  ImportedTrace trace;
  // File name, without folders.
  std::string name;
  // SHA-256 of the file as it lies on disk, hexadecimal.
  std::string sha256;
};

// A profile of the traces, one a rank of the same run:
// - op: each call of an operator, the kernels that it launched itself summed,
//   collectives apart; by name, input shapes and types;
// - annotation: each range, the kernels launched inside it summed, those of
//   nested ranges too, collectives apart; by name;
// - layer: the same by LayerKey, with the transfer of the collectives of the
//   layer's pass (POINT_KIND_LAYER);
// - collective: each kernel's transfer (collective_waiting.h), by kind, type,
//   group size and bytes.
// Ranges whose name would be no valid LayerKey go by name.
// A range or call without kernels gives no point. `version` >= 1. Fails with
// OUT_OF_RANGE where a sum leaves int64 nanoseconds, INVALID_ARGUMENT without
// inputs.
absl::StatusOr<v1::Profile> BuildProfile(
    const std::vector<ProfileInput>& inputs, int64_t version);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_PROFILE_BUILDER_H_
