// The one place where our errors become gRPC's.

#ifndef SERVER_GRPC_STATUS_H_
#define SERVER_GRPC_STATUS_H_

#include <grpcpp/support/status.h>

#include <algorithm>
#include <cstddef>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pipeweaver::server {

// Longer messages than this do not go through as gRPC's trailers.
inline constexpr size_t kMostMessageBytes = 2048;

// Codes have the same numbers in both. A long message, which can only quote
// long input, is cut.
inline grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  absl::string_view message = status.message();
  size_t length = std::min(message.size(), kMostMessageBytes);
  // Not within a character of UTF-8.
  while (length < message.size() && (message[length] & 0xC0) == 0x80) --length;
  std::string text(message.substr(0, length));
  if (length < message.size()) {
    absl::StrAppend(&text, "... (", message.size() - length, " bytes more)");
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.raw_code()), text);
}

}  // namespace pipeweaver::server

#endif  // SERVER_GRPC_STATUS_H_
