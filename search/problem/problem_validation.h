// The rules every scheduling problem obeys before it is searched.

#ifndef SEARCH_PROBLEM_PROBLEM_VALIDATION_H_
#define SEARCH_PROBLEM_PROBLEM_VALIDATION_H_

#include <cstdint>

#include "absl/status/status.h"
#include "search/problem/problem.h"

namespace pipeweaver::search {

// The largest time (ns) or size (bytes) a problem may name.
inline constexpr int64_t kMostQuantity = 999'999'999'999'999'999;

// OK when `problem` is well formed: ids unique; sweeps, stages and choices not
// empty; `after` in range, without circles and repeats; ranks in range; one
// memory limit a rank; quantities in 0..kMostQuantity; a sweep with a backward
// is not followed by one without; the sum of all durations and transfers, and
// of all bytes of a rank, below 2^63. Otherwise an INVALID_ARGUMENT made by
// FieldError. O(size of the problem).
absl::Status ValidateProblem(const Problem& problem);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_PROBLEM_VALIDATION_H_
