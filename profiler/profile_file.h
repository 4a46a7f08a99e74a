// Profiles as textproto files, one a version.

#ifndef PROFILER_PROFILE_FILE_H_
#define PROFILER_PROFILE_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pipeweaver/v1/profile.pb.h"

namespace pipeweaver::profiler {

// Checks what every profile holds to: format and version, keys given and not
// repeated, shapes within what a microbatch and a rank may have (limits.h),
// counts and times in order. INVALID_ARGUMENT names field, value,
// rule.
absl::Status ValidateProfile(const v1::Profile& profile);

// The part of ValidateProfile that is of a layer's key; figures not given are
// 0.
absl::Status ValidateLayerKey(const v1::LayerKey& key);

// The longest that a layer's pass may take in a valid profile: eleven days.
inline constexpr int64_t kMostLayerNs = 1'000'000'000'000'000;

// Reads a profile from text; `name` stands in errors. INVALID_ARGUMENT with
// line and column, or as ValidateProfile.
absl::StatusOr<v1::Profile> ParseProfile(absl::string_view text,
                                         absl::string_view name);

// Reads a file, plain or gzip.
absl::StatusOr<v1::Profile> ReadProfileFile(const std::string& path);

// Writes a valid profile, under a new name first and then renamed, so that
// readers see all of it or nothing. Fails with ALREADY_EXISTS rather than
// replace a file: versions do not change once published.
absl::Status WriteProfileFile(const v1::Profile& profile,
                              const std::string& path);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_PROFILE_FILE_H_
