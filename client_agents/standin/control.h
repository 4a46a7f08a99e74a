// Messages between the stand-in trainer's processes: what a real trainer says
// over its own collectives and queues.

#ifndef CLIENT_AGENTS_STANDIN_CONTROL_H_
#define CLIENT_AGENTS_STANDIN_CONTROL_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pipeweaver::client {

// Fixed size, one packet each.
struct ControlMessage {
  enum Kind : uint32_t {
    kSubmitted,  // submitter, and on to the ranks: value = attempt
    kHeld,  // rank: holds the checked program; value = digest's first 8 bytes
    kRun,   // to ranks: all hold the same program of the step, run it
    kDone,  // rank: value = walked nanoseconds; to the submitter: step is over
    kReport,  // submitter: `text` is a line of JSON about the step
    kFailed,  // any process: `text` says why
  };
  Kind kind = kFailed;
  uint64_t step = 0;
  uint64_t value = 0;
  int64_t time_ns = 0;  // steady clock of the event, one clock on one machine
  int64_t messages = 0;
  char text[1024] = {};

  void SetText(const std::string& line);
};

// One end of a connected pair of packet sockets. Blocking, one thread each way.
class ControlSocket {
 public:
  explicit ControlSocket(int fd) : fd_(fd) {}
  int fd() const { return fd_; }

  // Errors: UNAVAILABLE when the other end is closed.
  absl::Status Send(const ControlMessage& message) const;
  absl::StatusOr<ControlMessage> Receive() const;

 private:
  int fd_;
};

// Nanoseconds of the steady clock.
int64_t SteadyNowNs();

}  // namespace pipeweaver::client

#endif  // CLIENT_AGENTS_STANDIN_CONTROL_H_
