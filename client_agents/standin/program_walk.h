// Executes a rank's program the way a trainer would, with sleeps in place of
// kernels: real messages to the other ranks, durations as predicted, scaled.

#ifndef CLIENT_AGENTS_STANDIN_PROGRAM_WALK_H_
#define CLIENT_AGENTS_STANDIN_PROGRAM_WALK_H_

#include <chrono>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "client_agents/cc/program_check.h"
#include "client_agents/standin/rendezvous_transport.h"

namespace pipeweaver::client {

struct WalkOptions {
  // Slept time over predicted time, > 0.
  double time_scale = 0.01;
  // Longest wait for one transfer before the walk gives up.
  std::chrono::milliseconds transfer_timeout = std::chrono::seconds(20);
  // Added to the program's transfer numbers, so that those of different steps
  // differ on one transport.
  uint64_t first_transfer = 0;
  // Most bytes really sent of a transfer.
  int64_t max_payload_bytes = 4096;
};

struct WalkTimes {
  // One an action, since the start of the walk, in scaled nanoseconds.
  std::vector<uint64_t> start_offset_ns;
  std::vector<uint64_t> duration_ns;
  uint64_t step_ns = 0;
  int64_t messages = 0;
  int64_t message_bytes = 0;
};

// Runs the actions in order. Payloads carry the transfer's number and are
// compared on arrival. Errors: as RendezvousTransport::Wait; DATA_LOSS when a
// payload is not the one expected.
absl::StatusOr<WalkTimes> WalkProgram(const CheckedProgram& program,
                                      const WalkOptions& options,
                                      RendezvousTransport& transport);

}  // namespace pipeweaver::client

#endif  // CLIENT_AGENTS_STANDIN_PROGRAM_WALK_H_
