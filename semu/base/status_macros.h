// Early return on error for functions that return absl::Status or StatusOr.

#ifndef SEMU_BASE_STATUS_MACROS_H_
#define SEMU_BASE_STATUS_MACROS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

#define PW_CONCAT_INNER(a, b) a##b
#define PW_CONCAT(a, b) PW_CONCAT_INNER(a, b)

// Returns from the enclosing function when `expression` is not OK.
#define PW_RETURN_IF_ERROR(expression)                            \
  do {                                                            \
    if (absl::Status pw_status = (expression); !pw_status.ok()) { \
      return pw_status;                                           \
    }                                                             \
  } while (false)

// Assigns the value of a StatusOr expression to `lhs`, or returns its error.
#define PW_ASSIGN_OR_RETURN(lhs, expression) \
  PW_ASSIGN_OR_RETURN_IMPL(PW_CONCAT(pw_status_or_, __LINE__), lhs, expression)

#define PW_ASSIGN_OR_RETURN_IMPL(status_or, lhs, expression) \
  auto status_or = (expression);                             \
  if (!status_or.ok()) return status_or.status();            \
  lhs = *std::move(status_or)

#endif  // SEMU_BASE_STATUS_MACROS_H_
