// Errors about input that name the field, its value and the rule it breaks,
// both in the message and as status payloads for structured reports.

#ifndef SEARCH_PROBLEM_FIELD_ERROR_H_
#define SEARCH_PROBLEM_FIELD_ERROR_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace pipeweaver::search {

struct FieldErrorParts {
  std::string field;
  std::string value;
  std::string rule;
};

// An INVALID_ARGUMENT whose message is "<field> is <value>: <rule>". Values
// longer than 80 bytes are cut.
absl::Status FieldError(absl::string_view field, absl::string_view value,
                        absl::string_view rule);

// `status`, whose message is the rule, with a field and its value.
absl::Status WithField(absl::Status status, absl::string_view field,
                       absl::string_view value);

// The parts of a status made by FieldError or WithField; for any other status
// the rule is its message, field and value are empty.
FieldErrorParts GetFieldErrorParts(const absl::Status& status);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_FIELD_ERROR_H_
