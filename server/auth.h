// Who may call: a bearer token, compared in constant time.

#ifndef SERVER_AUTH_H_
#define SERVER_AUTH_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pipeweaver::server {

// Immutable, thread-safe.
class TokenAuth {
 public:
  // Lets everybody in.
  TokenAuth() = default;

  // Asks for the token in `path`: one line of 16 or more characters; space
  // around it does not count. Errors: INVALID_ARGUMENT naming token_file.
  static absl::StatusOr<TokenAuth> FromFile(const std::string& path);

  // `authorization` is the value of the call's header of that name; empty if it
  // has none. Errors: UNAUTHENTICATED.
  absl::Status Check(absl::string_view authorization) const;

  bool required() const { return !token_digest_.empty(); }

 private:
  std::string token_digest_;  // empty: no token is asked for
};

}  // namespace pipeweaver::server

#endif  // SERVER_AUTH_H_
