#include "client_agents/standin/control.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>

namespace pipeweaver::client {

void ControlMessage::SetText(const std::string& line) {
  const size_t size = std::min(line.size(), sizeof(text) - 1);
  std::memcpy(text, line.data(), size);
  text[size] = '\0';
}

absl::Status ControlSocket::Send(const ControlMessage& message) const {
  while (send(fd_, &message, sizeof(message), MSG_NOSIGNAL) < 0) {
    if (errno != EINTR) {
      return absl::UnavailableError("the other process is gone");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ControlMessage> ControlSocket::Receive() const {
  ControlMessage message;
  while (true) {
    const ssize_t n = recv(fd_, &message, sizeof(message), 0);
    if (n == static_cast<ssize_t>(sizeof(message))) return message;
    if (n < 0 && errno == EINTR) continue;
    return absl::UnavailableError("the other process is gone");
  }
}

int64_t SteadyNowNs() {
  return std::chrono::steady_clock::now().time_since_epoch() /
         std::chrono::nanoseconds(1);
}

}  // namespace pipeweaver::client
