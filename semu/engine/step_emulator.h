// The step emulator: runs the programs of a step's ranks in simulated time.
//
// With contention, an event loop: compute streams, link ports and copy engines
// are resources (resource.h) that are asked for their next change; ranks run
// their operations one by one and block in waits. A transfer may begin when
// both ends have posted it. Without contention, transfers take latency and
// occupancy from POST_SEND on, sends and copies are never waited for: the times
// are then those of the scheduling problem, found without an event queue. Both
// end with the same times where nothing contends.

#ifndef SEMU_ENGINE_STEP_EMULATOR_H_
#define SEMU_ENGINE_STEP_EMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "semu/engine/step_program.h"

namespace pipeweaver::semu {

struct EmulationOptions {
  bool contention = true;
  // On every transfer: > 0. A bandwidth factor of 2 halves occupancy.
  double latency_factor = 1;
  double bandwidth_factor = 1;
  // Standard deviation of a factor on every duration, mean 1, before it is cut
  // off at 0; drawn from `seed` and the place in the program alone.
  double duration_noise = 0;
  uint64_t seed = 0;
};

struct EmulatedStep {
  struct Rank {
    int64_t busy_ns = 0;           // computing
    int64_t transfer_wait_ns = 0;  // in waits for transfers
    int64_t copy_wait_ns = 0;      // in waits for host copies
    int64_t end_ns = 0;            // of its last operation
  };
  // [rank][position]: a rank's operations follow each other without a gap, the
  // first starts at 0.
  std::vector<std::vector<int64_t>> ends_ns;
  std::vector<Rank> ranks;
  int64_t makespan_ns = 0;  // end of the last compute operation

  int64_t StartNs(size_t rank, size_t position) const {
    return position == 0 ? 0 : ends_ns[rank][position - 1];
  }
};

// Runs `program` from time 0. `result` is overwritten; its memory is reused.
// Errors: FAILED_PRECONDITION when the ranks wait for each other, naming them;
// INVALID_ARGUMENT when factors and noise make its durations 2^60 ns or more in
// all, naming them.
// Thread-safe.
absl::Status EmulateStep(const StepProgram& program,
                         const EmulationOptions& options, EmulatedStep* result);

// Most bytes live at once on each rank. That follows from each rank's order
// alone (MemoryChange), whatever the times. Thread-safe.
std::vector<int64_t> PeakBytes(const StepProgram& program);

}  // namespace pipeweaver::semu

#endif  // SEMU_ENGINE_STEP_EMULATOR_H_
