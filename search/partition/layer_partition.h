// Consecutive layers onto chunks.

#ifndef SEARCH_PARTITION_LAYER_PARTITION_H_
#define SEARCH_PARTITION_LAYER_PARTITION_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"

namespace pipeweaver::search {

// Cuts a row of weights into `chunks` runs, some of which may be empty, so that
// the largest sum is least, and among those cuts the sum of squared sums is
// least (the rest is even too); of equals, the one whose first chunks are
// longest. Returns the lengths. O(chunks * n^2). REQUIRES: chunks >= 1; weights
// >= 0 and their sum below 2^62.
std::vector<int> PartitionLayers(absl::Span<const int64_t> weights, int chunks);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_LAYER_PARTITION_H_
