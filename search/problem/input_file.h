// Reads a whole input file, gunzipping names that end in ".gz".

#ifndef SEARCH_PROBLEM_INPUT_FILE_H_
#define SEARCH_PROBLEM_INPUT_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pipeweaver::search {

// The most bytes a file may hold once unpacked: a guard against gzip bombs.
inline constexpr int64_t kMostInputBytes = int64_t{1} << 30;

// Returns the content of `path`. Errors: INVALID_ARGUMENT naming the path
// when it cannot be read, is damaged gzip, or larger than `most_bytes`.
absl::StatusOr<std::string> ReadInputFile(const std::string& path,
                                          int64_t most_bytes = kMostInputBytes);

// Unpacks gzip data of one or more members. Errors: INVALID_ARGUMENT.
absl::StatusOr<std::string> Gunzip(absl::string_view packed,
                                   int64_t most_bytes = kMostInputBytes);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_INPUT_FILE_H_
