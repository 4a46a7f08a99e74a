// Consecutive layers onto chunks.

#ifndef SEARCH_PARTITION_LAYER_PARTITION_H_
#define SEARCH_PARTITION_LAYER_PARTITION_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/types/span.h"

namespace pipeweaver::search {

// Most that the weights of a row may sum up to: a chunk's sum and one weight
// more stay within int64.
inline constexpr int64_t kMostWeightSum = int64_t{1} << 62;

// Cuts a row of weights into `chunks` runs, some of which may be empty, so that
// the largest sum is least, and among those cuts the sum of squared sums is
// least (the rest is even too); of equals, the one whose first chunks are
// longest. Past 512 weights or 512 chunks the rest is filled from the front
// instead of made even. Returns the lengths. REQUIRES: chunks >= 1; weights >=
// 0 and their sum at most kMostWeightSum.
std::vector<int> PartitionLayers(absl::Span<const int64_t> weights, int chunks);

// The same among cuts in which no chunk's sum of `sizes` is above `most_size`;
// none if there is no such cut. REQUIRES: sizes as weights, one a weight.
std::optional<std::vector<int>> PartitionLayersWithin(
    absl::Span<const int64_t> weights, int chunks,
    absl::Span<const int64_t> sizes, int64_t most_size);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_LAYER_PARTITION_H_
