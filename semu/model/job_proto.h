// Job and layout: from and to protobuf. All rules that input must keep are
// checked here, so that the code behind may rely on them.
//
// Limits, chosen so that every product formed later stays within int64 or is
// formed in double: 64 modules, 256 edges, 256 layer groups and 4096 layers a
// module; hidden and ffn sizes, vocabulary and input size up to 2^24; 2^50
// parameters a job; 4096 ranks, 1024 tensor- or context-parallel GPUs, 2^20
// replicas; device memory up to 2^50 bytes, rates from 10^6 to 10^18 a second,
// link latency up to 1000 s; 2^26 tokens of a module a microbatch.

#ifndef SEMU_MODEL_JOB_PROTO_H_
#define SEMU_MODEL_JOB_PROTO_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pipeweaver/v1/job.pb.h"
#include "semu/base/limits.h"
#include "semu/model/job.h"

namespace pipeweaver::semu {

// OK if `name` is 1 to 63 letters, digits, '_', '-' or '.'; else
// INVALID_ARGUMENT naming `field`.
absl::Status ValidateName(absl::string_view field, absl::string_view name);

// The value of a job, defaults filled in. Job.layout is not read: see
// LayoutFromProto. Errors: INVALID_ARGUMENT naming field, value and rule.
absl::StatusOr<Job> JobFromProto(const v1::Job& proto);

// The value of a layout for `job`. Rules: one entry a module in order; 1 to
// executor.max_segments segments; in a segment 1 to P chunks on ranks that
// ascend or, if the executor can place a V, descend; all layers of the module
// once and in order. Errors: INVALID_ARGUMENT naming field, value and rule.
absl::StatusOr<Layout> LayoutFromProto(const v1::Layout& proto, const Job& job);

v1::Layout LayoutToProto(const Layout& layout, const Job& job);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_JOB_PROTO_H_
