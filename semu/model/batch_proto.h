// Batch metadata: from protobuf. All rules that input must keep are checked
// here.
//
// Limits: 4096 microbatches a batch, 65536 items of a module in a microbatch,
// 2^20 items and 2^20 uses a batch, 2^26 tokens of a module in a microbatch,
// and as many that its items consume.

#ifndef SEMU_MODEL_BATCH_PROTO_H_
#define SEMU_MODEL_BATCH_PROTO_H_

#include <vector>

#include "absl/status/statusor.h"
#include "google/protobuf/repeated_field.h"
#include "pipeweaver/v1/batch.pb.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::semu {

// The value of a batch for `job`: pixels become tokens by the module's grid,
// and modules without modality get their items (a producer's item of n tokens
// makes one of ceil(n / tokens_merged)) and their uses filled in.
//
// Rules past the ranges: an item that crosses no edge must belong to a module
// that has no consumers or a loss of its own, frozen or not, forward-only or
// not (its work would be wasted, so the loader is wrong); tokens consumed by an
// item must not exceed its own tokens, unless its module takes them as a
// condition (LAYER_KIND_DIT); a pair is used once. An item that consumes
// nothing is fine, a module without items too.
//
// Errors: INVALID_ARGUMENT naming field, value and rule.
absl::StatusOr<Batch> BatchFromProto(const v1::BatchMetadata& proto,
                                     const Job& job);

// Most batches that a layout may be proposed for.
constexpr int kMaxSampleBatches = 8;

// Those batches, cut to their first kSampleMicrobatches: none forward-only,
// with at most as many items in all as one batch may have.
//
// Errors: INVALID_ARGUMENT naming sample_batches[i], field, value and rule.
absl::StatusOr<std::vector<Batch>> SampleBatchesFromProto(
    const google::protobuf::RepeatedPtrField<v1::BatchMetadata>& protos,
    const Job& job);

// The message whose value is `batch`: items by their tokens, ascending modules
// and edges, nothing listed that is empty or filled in.
v1::BatchMetadata BatchToProto(const Batch& batch, const Job& job);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_BATCH_PROTO_H_
