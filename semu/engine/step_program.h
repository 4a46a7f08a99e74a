// What the step emulator runs: one list of operations a rank, and the transfers
// and host copies that they start and wait for. Knows nothing of models or
// plans; whoever asks for an emulation translates into this.

#ifndef SEMU_ENGINE_STEP_PROGRAM_H_
#define SEMU_ENGINE_STEP_PROGRAM_H_

#include <cstdint>
#include <vector>

namespace pipeweaver::semu {

enum class StepOpKind : uint8_t {
  kCompute,    // occupies the rank for duration_ns
  kPostSend,   // index: a transfer; never blocks
  kPostRecv,   // index: a transfer; never blocks
  kWaitSend,   // index: a transfer; until it has ended
  kWaitRecv,   // index: a transfer; until it has ended
  kStartCopy,  // index: a host copy; never blocks
  kWaitCopy,   // index: a host copy; until it has ended
  kMark,       // takes no time
};

struct StepOp {
  StepOpKind kind = StepOpKind::kCompute;
  int32_t index = 0;
  int64_t duration_ns = 0;  // of kCompute, >= 0
};

// Bytes that an operation allocates, less those that it frees. The peak is
// taken while compute operations run and at posts.
struct MemoryChange {
  int64_t at_start = 0;
  int64_t at_end = 0;
  // Live at once while it runs, beyond what is live after at_start.
  int64_t transient = 0;
};

struct StepTransfer {
  int from_rank = 0;
  int to_rank = 0;
  int64_t occupancy_ns = 0;  // bytes over bandwidth: the ports are taken
  int64_t latency_ns = 0;    // and then the value is on its way
};

struct StepCopy {
  int rank = 0;
  bool to_host = false;
  int64_t duration_ns = 0;
};

// A step of one replica. REQUIRES for emulation: indices are in range; each
// transfer has one post and one wait on each of its two ranks, each copy one
// start on its rank.
struct StepProgram {
  std::vector<std::vector<StepOp>> ranks;        // [rank][position]
  std::vector<std::vector<MemoryChange>> bytes;  // [rank][position]
  std::vector<StepTransfer> transfers;           // posts of a rank ascend in it
  std::vector<StepCopy> copies;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_ENGINE_STEP_PROGRAM_H_
