// PW_CHECK: for what must hold whatever a user sends. What a user can cause is
// an absl::Status instead.

#ifndef SEMU_BASE_CHECK_H_
#define SEMU_BASE_CHECK_H_

#include <cstdio>
#include <cstdlib>

namespace pipeweaver::internal {

[[noreturn]] inline void CheckFailed(const char* file, int line,
                                     const char* condition) {
  std::fprintf(stderr, "%s:%d: check failed: %s\n", file, line, condition);
  std::abort();
}

}  // namespace pipeweaver::internal

// Aborts the process with file, line and condition when `condition` is false.
#define PW_CHECK(condition)                                                \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ::pipeweaver::internal::CheckFailed(__FILE__, __LINE__, #condition); \
    }                                                                      \
  } while (false)

#endif  // SEMU_BASE_CHECK_H_
