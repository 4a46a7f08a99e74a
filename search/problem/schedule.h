// A schedule of a scheduling problem: the order of stages on every rank and the
// memory choice of every stage pair. Times follow from the order
// (search/problem/timing.h); the order is the decision.

#ifndef SEARCH_PROBLEM_SCHEDULE_H_
#define SEARCH_PROBLEM_SCHEDULE_H_

#include <cstdint>
#include <vector>

namespace pipeweaver::search {

enum class StageKind : uint8_t {
  kForward,     // F
  kBackward,    // B: input and weight gradients in one
  kInputGrad,   // I
  kWeightGrad,  // W
};

// The letter that schedules and pictures use: 'F', 'B', 'I' or 'W'.
constexpr char StageKindLetter(StageKind kind) {
  constexpr char kLetters[] = {'F', 'B', 'I', 'W'};
  return kLetters[static_cast<int>(kind)];
}

// One stage of one sweep in one direction, at its place in a rank's order.
struct ScheduledStage {
  StageKind kind = StageKind::kForward;
  int sweep = 0;   // index into Problem::sweeps
  int stage = 0;   // index into Sweep::stages
  int choice = 0;  // index into Stage::choices; equal for F and its backward
};

struct Schedule {
  std::vector<std::vector<ScheduledStage>> ranks;  // [rank][position]
};

// When each stage of a schedule runs; [rank][position] as in Schedule::ranks.
struct StageTimes {
  struct Interval {
    int64_t start_ns = 0;
    int64_t end_ns = 0;
  };
  std::vector<std::vector<Interval>> ranks;
  int64_t makespan_ns = 0;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_SCHEDULE_H_
