// Profiles as textproto files, one a version.

#include "profiler/profile_file.h"

#include <fcntl.h>
#include <google/protobuf/text_format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <set>

#include "absl/strings/str_cat.h"
#include "proto/text/text_proto.h"
#include "semu/base/limits.h"
#include "semu/base/status_macros.h"
#include "semu/base/text_source.h"

namespace pipeweaver::profiler {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 30;

absl::Status CheckRange(absl::string_view field, int64_t value, int64_t most) {
  if (value >= 0 && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, ", must be 0 to ", most));
}

absl::Status CheckPoint(const v1::MeasuredPoint& point) {
  const v1::PointKey& key = point.key();
  if (key.kind() == v1::POINT_KIND_UNSPECIFIED)
    return absl::InvalidArgumentError("key.kind: not set");
  if (key.kind() == v1::POINT_KIND_LAYER && !key.has_layer()) {
    return absl::InvalidArgumentError(
        "key.layer: not set, must be where kind is POINT_KIND_LAYER");
  }
  if (key.kind() == v1::POINT_KIND_LAYER) {
    PW_RETURN_IF_ERROR(ValidateLayerKey(key.layer()));
    PW_RETURN_IF_ERROR(CheckRange("max_ns", point.max_ns(), kMostLayerNs));
  }
  if (point.count() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("count: ", point.count(), ", must be at least 1"));
  }
  if (point.min_ns() < 0 || point.median_ns() < point.min_ns() ||
      point.max_ns() < point.median_ns() || point.total_ns() < point.max_ns()) {
    return absl::InvalidArgumentError(
        absl::StrCat("times: must satisfy 0 <= min_ns ", point.min_ns(),
                     " <= median_ns ", point.median_ns(), " <= max_ns ",
                     point.max_ns(), " <= total_ns ", point.total_ns()));
  }
  if (point.waiting_ns() < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "waiting_ns: ", point.waiting_ns(), ", must be at least 0"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateLayerKey(const v1::LayerKey& key) {
  const auto given = [](int64_t figure) {
    return figure > 0 ? figure : semu::kMaxMicrobatchTokens;
  };
  PW_RETURN_IF_ERROR(CheckRange("key.layer.tensor_parallel",
                                key.tensor_parallel(), semu::kMaxGpusOfRank));
  PW_RETURN_IF_ERROR(CheckRange("key.layer.context_parallel",
                                key.context_parallel(), semu::kMaxGpusOfRank));
  PW_RETURN_IF_ERROR(
      CheckRange("key.layer.tokens", key.tokens(), semu::kMaxMicrobatchTokens));
  const int64_t tokens = given(key.tokens());
  PW_RETURN_IF_ERROR(CheckRange("key.layer.items", key.items(), tokens));
  PW_RETURN_IF_ERROR(
      CheckRange("key.layer.max_tokens", key.max_tokens(), tokens));
  const int64_t longest = std::min(tokens, given(key.max_tokens()));
  PW_RETURN_IF_ERROR(
      CheckRange("key.layer.sum_squares", key.sum_squares(), tokens * longest));
  PW_RETURN_IF_ERROR(CheckRange("key.layer.condition_tokens",
                                key.condition_tokens(),
                                semu::kMaxMicrobatchTokens));
  return CheckRange("key.layer.condition_products", key.condition_products(),
                    key.condition_tokens() * longest);
}

absl::Status ValidateProfile(const v1::Profile& profile) {
  if (profile.format_version() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "format_version: ", profile.format_version(), ", must be 1"));
  }
  if (profile.version() < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("version: ", profile.version(), ", must be at least 1"));
  }
  std::set<std::string> keys;
  for (int i = 0; i < profile.points_size(); ++i) {
    absl::Status status = CheckPoint(profile.points(i));
    if (status.ok() &&
        !keys.insert(profile.points(i).key().SerializeAsString()).second) {
      status = absl::InvalidArgumentError(
          absl::StrCat("key: ", profile.points(i).key().ShortDebugString(),
                       ", is that of an earlier point: must be unique"));
    }
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("points[", i, "]: ", status.message()));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Profile> ParseProfile(absl::string_view text,
                                         absl::string_view name) {
  v1::Profile profile;
  PW_RETURN_IF_ERROR(ParseTextProto(text, name, profile));
  if (const absl::Status status = ValidateProfile(profile); !status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", status.message()));
  }
  return profile;
}

absl::StatusOr<v1::Profile> ReadProfileFile(const std::string& path) {
  PW_ASSIGN_OR_RETURN(const std::string text,
                      ReadTextFile(path, kMaxFileBytes));
  return ParseProfile(text, path);
}

absl::Status WriteProfileFile(const v1::Profile& profile,
                              const std::string& path) {
  PW_RETURN_IF_ERROR(ValidateProfile(profile));
  std::string text;
  if (!google::protobuf::TextFormat::PrintToString(profile, &text)) {
    return absl::InternalError("the profile could not be printed");
  }
  text = absl::StrCat(
      "# proto-file: proto/pipeweaver/v1/profile.proto\n# proto-message: "
      "pipeweaver.v1.Profile\n\n",
      text);

  std::string temporary = absl::StrCat(path, ".XXXXXX");
  const auto failed = [&path, &temporary](absl::string_view what, int code) {
    unlink(temporary.c_str());
    const std::string message =
        absl::StrCat(path, ": ", what, ": ", std::strerror(code));
    return code == EEXIST ? absl::AlreadyExistsError(message)
                          : absl::UnavailableError(message);
  };
  const int file = mkstemp(temporary.data());
  if (file < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": cannot be written: ", std::strerror(errno)));
  }
  const char* next = text.data();
  std::size_t left = text.size();
  while (left > 0) {
    const ssize_t written = write(file, next, left);
    if (written < 0) {
      const int code = errno;
      close(file);
      return failed("write", code);
    }
    next += written;
    left -= static_cast<std::size_t>(written);
  }
  // mkstemp's files are for the owner alone.
  const bool synced = fchmod(file, 0644) == 0 && fsync(file) == 0;
  const int code = errno;
  if (close(file) != 0 || !synced) return failed("write", code);
  // Unlike rename, link does not replace.
  if (link(temporary.c_str(), path.c_str()) != 0)
    return failed("publish", errno);
  unlink(temporary.c_str());
  return absl::OkStatus();
}

}  // namespace pipeweaver::profiler
