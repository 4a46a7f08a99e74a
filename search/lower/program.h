// A plan lowered to actions: one program a rank, ready to be executed. Mirrors
// ActionColumns of plan.proto, where every field is explained.

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
  kWaitCopy,
  kGradsReady,
};

struct Action {
  ActionKind kind = ActionKind::kForward;
  int sweep = -1;  // index into Problem::sweeps; -1 for kGradsReady
  int stage = 0;   // position in the sweep; the chunk of kGradsReady
  int choice = 0;
  // kGradsReady: which chunk's gradients are complete.
  int module = -1;
  int segment = -1;
  // Posts and waits: index into StepPrograms::transfers.
  int transfer = -1;
  int64_t start_ns = 0;  // predicted
  int64_t end_ns = 0;
};

// One value that crosses ranks: one event on both, in one total order, which is
// the order of StepPrograms::transfers.
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

struct StepPrograms {
  std::vector<std::vector<Action>> ranks;  // [rank][position]
  std::vector<Transfer> transfers;         // in the global total order
  int64_t makespan_ns = 0;                 // predicted, transfers contending
  // Most bytes live along each rank's program, transfer buffers included.
  std::vector<int64_t> peak_bytes;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_LOWER_PROGRAM_H_
