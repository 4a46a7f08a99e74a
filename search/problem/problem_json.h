// Problems and schedules as JSON files, the contract between cost models,
// search and checkers.
//
// Problem:
//   {"ranks": 4, "p2p_latency_ns": 20000, "split_backward": true,
//    "memory_limit_bytes": [1000, 1000, 1000, 1000],
//    "segments": [{"id": "mb0/vision/0", "microbatch": 0, "backward": true,
//      "after": [], "stages": [{"rank": 0, "transfer_ns": 25000, "choices": [
//        {"name": "keep", "forward_ns": 1, "input_grad_ns": 1,
//         "weight_grad_ns": 1, "activation_bytes": 10, "backward_bytes": 11,
//         "weight_grad_bytes": 9, "fused_backward_ns": 2,
//         "fused_backward_bytes": 3}]}]}]}
// Quantities are integers 0..10^18-1; times and sizes may be strings of 1 to 18
// digits. Optional: microbatch (0), backward (true), after ([]), transfer_ns
// (p2p_latency_ns), name (""), backward_bytes and weight_grad_bytes
// (activation_bytes), fused_backward_ns (no fused backward),
// fused_backward_bytes (backward_bytes). Unknown keys are ignored.
//
// Schedule:
//   {"makespan_ns": 12, "lower_bound_ns": 11, "ranks": [[{"kind": "F",
//     "segment": "mb0/vision/0", "stage": 0, "choice": 0, "start_ns": 0,
//     "end_ns": 1}]]}
// One list per rank, in execution order.

#ifndef SEARCH_PROBLEM_PROBLEM_JSON_H_
#define SEARCH_PROBLEM_PROBLEM_JSON_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "search/problem/problem.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

// Reads a problem and checks it (ValidateProblem). Errors: INVALID_ARGUMENT
// with field, value and rule (field_error.h).
absl::StatusOr<Problem> ParseProblemJson(absl::string_view text);

// Reads the order of a schedule of `problem`. Checks that every entry names a
// stage of the problem on its own rank and a choice in range; not that the
// order is complete or can run (timing.h does). Errors: INVALID_ARGUMENT.
absl::StatusOr<Schedule> ParseScheduleJson(const Problem& problem,
                                           absl::string_view text);

// A member of a schedule's JSON, and what it must say where it is there.
struct ExactMember {
  const char* field;
  int64_t value;
};

// Errors: INVALID_ARGUMENT naming the first of `members` that says something
// else. REQUIRES: ParseScheduleJson took `text`.
absl::Status CheckExact(absl::string_view text,
                        absl::Span<const ExactMember> members);

// A name and a value that stand at the head of a schedule's JSON; the value is
// JSON text.
using JsonMember = std::pair<std::string, std::string>;

// The schedule as JSON text: `members` in their order, then the rank lists with
// the given times. REQUIRES: `times` has the shape of `schedule`.
std::string ScheduleToJson(const Problem& problem, const Schedule& schedule,
                           const StageTimes& times,
                           const std::vector<JsonMember>& members);

// The problem as JSON text that ParseProblemJson reads back to the same value.
std::string ProblemToJson(const Problem& problem);

// `text` as a JSON string, quotes included.
std::string JsonString(absl::string_view text);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_PROBLEM_JSON_H_
