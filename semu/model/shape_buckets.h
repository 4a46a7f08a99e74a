// What executors that take fixed shapes only ask of a batch.

#ifndef SEMU_MODEL_SHAPE_BUCKETS_H_
#define SEMU_MODEL_SHAPE_BUCKETS_H_

#include "absl/status/status.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::semu {

// Such executors pad items, but cut none. Errors: INVALID_ARGUMENT for an item
// of microbatch `index` with more tokens than the largest of
// executor.shape_buckets; without buckets every item will do.
absl::Status CheckShapeBuckets(const Job& job, const Microbatch& microbatch,
                               int index);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_SHAPE_BUCKETS_H_
