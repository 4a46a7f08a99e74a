// A plan lowered to actions: one program a rank, ready to be executed. Mirrors
// ActionColumns of plan.proto, where every field is explained.
//
// Memory along a program, in bytes per GPU of the rank:
// - a stage pair holds activation_bytes from its F's start on; in their place
//   backward_bytes (a fused B: fused_backward_bytes) while its B or I runs;
//   weight_grad_bytes from I's end to W's end; nothing after B or W. Without a
//   backward it holds activation_bytes while F runs.
// - a receive buffer is held from POST_RECV until its consumer starts, whose
// own
//   bytes hold the value from then on; a sent tensor from POST_SEND to
//   WAIT_SEND.
// - offload_bytes of a choice that offloads are held, too, from F's start to
// the
//   WAIT_COPY of its OFFLOAD, and from RELOAD until the backward starts, whose
//   own bytes hold them from then on.
// What is live must fit while a stage runs, behind an I, and at each post and
// RELOAD.

#ifndef SEARCH_LOWER_PROGRAM_H_
#define SEARCH_LOWER_PROGRAM_H_

#include <cstdint>
#include <vector>

namespace pipeweaver::search {

enum class ActionKind : uint8_t {
  kForward,
  kBackward,
  kInputGrad,
  kWeightGrad,
  kPostSend,
  kPostRecv,
  kWaitSend,
  kWaitRecv,
  kOffload,
  kReload,
  // Of the last OFFLOAD or RELOAD of the stage pair before it.
  kWaitCopy,
  kGradsReady,
};

constexpr int kNumActionKinds = 12;
static_assert(static_cast<int>(ActionKind::kGradsReady) + 1 == kNumActionKinds);

constexpr bool IsCompute(ActionKind kind) {
  return kind <= ActionKind::kWeightGrad;
}

// A post or a wait.
constexpr bool IsTransfer(ActionKind kind) {
  return kind >= ActionKind::kPostSend && kind <= ActionKind::kWaitRecv;
}

// In 32 bytes: whoever goes through programs is bound by memory traffic.
struct Action {
  int64_t start_ns = 0;  // predicted
  int64_t end_ns = 0;
  // Index into Problem::sweeps and position in the sweep. Of posts and waits:
  // this rank's end of the transfer. Of kGradsReady: the backward that
  // completed its chunk's gradients; a chunk without any backward in the step
  // has no such action.
  int32_t sweep = 0;
  int16_t stage = 0;  // a sweep has no more stages than a model has layers
  int16_t choice = 0;
  // Posts and waits: index into StepPrograms::transfers.
  int32_t transfer = -1;
  ActionKind kind = ActionKind::kForward;
};
static_assert(sizeof(Action) == 32);

// One value that crosses ranks: one event on both, in one total order, which is
// the order of StepPrograms::transfers. Where several sweeps consume a value,
// each has a transfer of its own, since each takes the items it needs.
struct Transfer {
  int from_rank = 0;
  int to_rank = 0;
  int from_sweep = 0;
  int from_stage = 0;
  int to_sweep = 0;
  int to_stage = 0;
  bool gradient = false;
  int64_t bytes = 0;        // per GPU of the rank
  int64_t duration_ns = 0;  // latency and bytes over bandwidth
};

// What the ranks and their executor allow.
struct ProgramLimits {
  // One a rank: for activations, transfers and copies together; >= those of the
  // scheduling problem, which counts no transfers.
  std::vector<int64_t> memory_limit_bytes;
  // Most receives posted and not yet waited for on a rank, >= 1.
  int max_receives_ahead = 2;
};

struct StepPrograms {
  std::vector<std::vector<Action>> ranks;  // [rank][position]
  std::vector<Transfer> transfers;         // in the global total order
  int64_t makespan_ns = 0;                 // predicted
  // Most bytes live along each rank's program, transfer buffers included.
  std::vector<int64_t> peak_bytes;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_LOWER_PROGRAM_H_
