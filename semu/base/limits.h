// Sizes up to which jobs, batches and profiles are taken.

#ifndef SEMU_BASE_LIMITS_H_
#define SEMU_BASE_LIMITS_H_

#include <cstdint>

namespace pipeweaver::semu {

inline constexpr int64_t kMaxModules = 64;
inline constexpr int kMaxMicrobatches = 4096;
inline constexpr int64_t kMaxMicrobatchTokens = int64_t{1} << 26;
// Shape buckets, of the largest, that a module's longest microbatch may fill.
inline constexpr int64_t kMostBucketsFilled = 4096;
// GPUs that work as one rank, in tensor and in context parallel each.
inline constexpr int64_t kMaxGpusOfRank = 1024;

}  // namespace pipeweaver::semu

#endif  // SEMU_BASE_LIMITS_H_
