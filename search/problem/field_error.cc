// Errors that name field, value and rule; see field_error.h.

#include "search/problem/field_error.h"

#include <string>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pipeweaver::search {
namespace {

constexpr absl::string_view kFieldUrl = "pipeweaver/field";
constexpr absl::string_view kValueUrl = "pipeweaver/value";
constexpr absl::string_view kRuleUrl = "pipeweaver/rule";
constexpr size_t kMostValueBytes = 80;

std::string Payload(const absl::Status& status, absl::string_view url) {
  const auto payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : std::string();
}

}  // namespace

absl::Status FieldError(absl::string_view field, absl::string_view value,
                        absl::string_view rule) {
  const std::string shown =
      value.size() > kMostValueBytes
          ? absl::StrCat(value.substr(0, kMostValueBytes), "...")
          : std::string(value);
  absl::Status status = absl::InvalidArgumentError(
      absl::StrCat(field, " is ", shown, ": ", rule));
  status.SetPayload(kFieldUrl, absl::Cord(field));
  status.SetPayload(kValueUrl, absl::Cord(shown));
  status.SetPayload(kRuleUrl, absl::Cord(rule));
  return status;
}

absl::Status WithField(absl::Status status, absl::string_view field,
                       absl::string_view value) {
  status.SetPayload(kFieldUrl, absl::Cord(field));
  status.SetPayload(kValueUrl, absl::Cord(value));
  return status;
}

FieldErrorParts GetFieldErrorParts(const absl::Status& status) {
  FieldErrorParts parts{.field = Payload(status, kFieldUrl),
                        .value = Payload(status, kValueUrl),
                        .rule = Payload(status, kRuleUrl)};
  if (parts.rule.empty()) parts.rule = std::string(status.message());
  return parts;
}

}  // namespace pipeweaver::search
