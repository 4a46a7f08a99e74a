// What the step emulator runs: one list of operations a rank, and the transfers
// and host copies that they start and wait for. Knows nothing of models or
// plans; whoever asks for an emulation translates into this.

#ifndef SEMU_ENGINE_STEP_PROGRAM_H_
#define SEMU_ENGINE_STEP_PROGRAM_H_

#include <cstdint>
#include <vector>

#include "semu/base/check.h"

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

// One operation in 8 bytes: an emulation of many is bound by memory traffic.
class StepOp {
 public:
  static constexpr int64_t kMaxDurationNs = (int64_t{1} << 60) - 1;

  // `index` is kept of operations that have one, `duration_ns` of kCompute:
  // 0 .. kMaxDurationNs.
  StepOp(StepOpKind kind, int32_t index, int64_t duration_ns)
      : bits_((kind == StepOpKind::kCompute ? static_cast<uint64_t>(duration_ns)
                                            : static_cast<uint32_t>(index))
                  << kKindBits |
              static_cast<uint64_t>(kind)) {
    PW_CHECK(duration_ns >= 0 && duration_ns <= kMaxDurationNs);
  }

  StepOpKind kind() const {
    return static_cast<StepOpKind>(bits_ & ((1 << kKindBits) - 1));
  }
  // REQUIRES: not kCompute.
  int32_t index() const { return static_cast<int32_t>(bits_ >> kKindBits); }
  // REQUIRES: kCompute.
  int64_t duration_ns() const {
    return static_cast<int64_t>(bits_ >> kKindBits);
  }

 private:
  static constexpr int kKindBits = 4;

  uint64_t bits_;  // the kind below, index or duration above
};
static_assert(sizeof(StepOp) == 8);

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
// start on its rank; all durations together stay below 2^63.
struct StepProgram {
  std::vector<std::vector<StepOp>> ranks;        // [rank][position]
  std::vector<std::vector<MemoryChange>> bytes;  // [rank][position]
  std::vector<StepTransfer> transfers;           // posts of a rank ascend in it
  std::vector<StepCopy> copies;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_ENGINE_STEP_PROGRAM_H_
