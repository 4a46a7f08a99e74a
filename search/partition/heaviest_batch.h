// Batches that fill memory the most, for what must fit whatever comes.

#ifndef SEARCH_PARTITION_HEAVIEST_BATCH_H_
#define SEARCH_PARTITION_HEAVIEST_BATCH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

struct HeavyBatch {
  semu::Batch batch;
  // For error messages, such as "in as few items as can be".
  std::string description;
};

// Batches of one microbatch with as many tokens as max_microbatch_tokens allows
// each module, in at most kMostBucketsFilled items a module; a module without
// modality has its producer's items. Along every edge each item is consumed
// once, but the shortest by all of the consumer's: so no part of the microbatch
// can be run and freed before another begins. No item has more than twice B_m
// tokens, for which layers have a reserve (memory_plan.h), unless there would
// be too many. The items are as few as can be; where the executor takes shape
// buckets, in turn also padded the most while each is a sub-microbatch of its
// own, in all modules and in all but one, of about B_m tokens, and of just over
// half of the largest bucket, no two of which share a sub-microbatch.
std::vector<HeavyBatch> HeaviestBatches(const semu::Job& job,
                                        const semu::Layout& layout);

// The lengths of at most `items` items, of at most `tokens` tokens in all and
// `longest` each, that take about the most once each is padded to one of
// `buckets`, ascending (lists that take some percent more are possible, but
// rare). REQUIRES: all are at least 1, and there are buckets.
std::vector<int64_t> MostPaddedItems(int64_t tokens, int64_t items,
                                     int64_t longest,
                                     absl::Span<const int64_t> buckets);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_HEAVIEST_BATCH_H_
