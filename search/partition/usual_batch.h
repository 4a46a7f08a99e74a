// What a job's batches may look like when nothing but its limits is known.

#ifndef SEARCH_PARTITION_USUAL_BATCH_H_
#define SEARCH_PARTITION_USUAL_BATCH_H_

#include <cstdint>

#include "semu/cost/cost_model.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"

namespace pipeweaver::search {

// Tokens of a usual item: a 728 px square of images, 4 s of audio, a 2 s clip
// at 16 FPS, 1024 tokens of text, or what a producer's makes; at most the
// module's longest microbatch.
int64_t UsualItemTokens(const semu::Job& job, int module);

// `tokens` in usual items, the last of which may be shorter.
semu::Shape UsualShape(const semu::Job& job, int module, int64_t tokens);

// A batch of usual items: in one microbatch after the other, modules that
// others consume are 1/4, 2/4, 3/4 and completely full, as far as there is room
// for them, and the rest completely.
semu::Batch UsualBatch(const semu::Job& job, int microbatches);

// A batch in which microbatches differ: in each, items are half to one and a
// half times as long as usual ones; modules that others consume are empty (but
// for an item) to full, the others half full to full. The same for the same
// seed on any machine.
semu::Batch VariedBatch(const semu::Job& job, int microbatches, uint64_t seed);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_USUAL_BATCH_H_
