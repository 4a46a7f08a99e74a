// Programs in the form in which they travel: v1::Program, serialised once a
// rank, with the digests of plan.proto. And back, for traces and what-if
// questions.

#ifndef SEARCH_LOWER_PROGRAM_PROTO_H_
#define SEARCH_LOWER_PROGRAM_PROTO_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pipeweaver/v1/plan.pb.h"
#include "search/lower/program.h"
#include "search/partition/step_problem.h"

namespace pipeweaver::search {

class WorkerPool;

// A sealed plan as bytes. Equal inputs give equal bytes.
struct PlanBytes {
  std::string plan_digest;            // 32 bytes
  std::vector<std::string> programs;  // serialised v1::Program, one a rank
};

// On the threads of `pool`; null: on the caller's.
// REQUIRES: the programs passed CheckPrograms on `step`. Thread-safe.
PlanBytes SerializePlan(const StepProblem& step, const StepPrograms& programs,
                        const v1::PlanIdentity& identity,
                        WorkerPool* pool = nullptr);

// An action as it stands in a serialised program; fields as in plan.proto's
// ActionColumns, those that do not apply 0.
struct ProgramRow {
  ActionKind kind = ActionKind::kForward;
  uint32_t sub_microbatch = 0;
  uint32_t module = 0;      // of the sub-microbatch
  uint32_t microbatch = 0;  // of the sub-microbatch
  uint32_t segment = 0;
  uint32_t chunk = 0;
  uint32_t choice = 0;
  uint32_t transfer = 0;
  uint32_t peer = 0;
  uint64_t bytes = 0;
  uint32_t edge_sub_microbatch = 0;
  bool gradient = false;
  int64_t start_ns = 0;
  int64_t end_ns = 0;
};

struct ParsedProgram {
  v1::PlanIdentity identity;
  std::string plan_digest;
  int rank = 0;
  int num_ranks = 0;
  std::vector<ProgramRow> rows;
};

// Parses a serialised v1::Program from anywhere. Errors: INVALID_ARGUMENT when
// it does not parse, when columns differ in length, or when a value is out of
// its range (modules and microbatches: those of semu/base/limits.h), naming
// field, value and rule; DATA_LOSS when digests do not match.
absl::StatusOr<ParsedProgram> ParseProgram(absl::string_view bytes);

}  // namespace pipeweaver::search

#endif  // SEARCH_LOWER_PROGRAM_PROTO_H_
