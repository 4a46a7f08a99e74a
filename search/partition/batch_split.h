// Splits every microbatch's items of a module into sub-microbatches of
// near-equal cost. Trainers compute the same split for themselves: what changes
// here changes in client_agents/python/pipeweaver/split.py too (both are tested
// on testdata/).

#ifndef SEARCH_PARTITION_BATCH_SPLIT_H_
#define SEARCH_PARTITION_BATCH_SPLIT_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "search/partition/step_problem.h"
#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

class WorkerPool;

// Divides items into `groups` groups so that the largest sum of weights is
// small: runs of neighbours if that costs at most 5 % (neighbours are consumed
// together, so that a consumer waits for fewer sub-microbatches), else longest
// processing time first. No group is empty; groups in the order of their first
// items, items ascending. REQUIRES: 1 <= groups <= weights.size(), weights >=
// 0.
std::vector<std::vector<int>> SplitItems(absl::Span<const double> weights,
                                         int groups);

// All sub-microbatches of a batch, by microbatch, then module, then first item.
// A microbatch's module with N tokens makes ceil(N / B_m) of them, at most one
// an item and more where the largest shape bucket demands it. A module without
// modality is split as its producer is. Items weigh what their arithmetic does.
//
// The threads of `pool`, if any, share the work.
//
// Errors: INVALID_ARGUMENT when an item is larger than the largest shape
// bucket.
absl::StatusOr<std::vector<SubMicrobatch>> SplitBatch(
    const semu::Job& job, const semu::Layout& layout, const semu::Batch& batch,
    WorkerPool* pool = nullptr);

// The statistics of sub-microbatches, padded to their shape buckets: padding
// counts as one more item. Linear in the items where those of a module of a
// microbatch stand together, as SplitBatch leaves them.
std::vector<semu::Shape> ShapesOf(
    const semu::Job& job, const semu::Batch& batch,
    absl::Span<const SubMicrobatch> sub_microbatches);

// Tokens of an item of `producer_tokens` as they cross `edge`.
int64_t CrossingTokens(const semu::ModuleEdge& edge, int64_t producer_tokens);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_BATCH_SPLIT_H_
