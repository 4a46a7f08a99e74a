// What a client checks of a program before it runs it: that it is whole, that
// it is the one asked for, and that its columns mean something. It needs the
// protocol alone, nothing of the planner.

#ifndef CLIENT_AGENTS_CC_PROGRAM_CHECK_H_
#define CLIENT_AGENTS_CC_PROGRAM_CHECK_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/plan.pb.h"

namespace pipeweaver::client {

// A program whose parts are parsed and checked.
struct CheckedProgram {
  v1::Program program;
  v1::BatchSplit split;
  v1::ActionColumns actions;
};

// Checks digests, key, rank, and that
// - all columns are of one length, kinds in range, and every index names
//   something of the program: a sub-microbatch of its split, a chunk and a
//   choice of its `choices`, one of its ranks;
// - posts come in ascending order of transfers, each once;
// - every wait follows its post and every post has its wait;
// - a forward comes before its backward, an input gradient before its weight
//   gradient, with the same choice, each once;
// - where microbatches were moved, each of the step's stands in one place, the
//   batch and the split have as many as the replica has places, and there is a
//   plan for each replica.
// Errors: DATA_LOSS naming the field, its value and the rule it breaks.
absl::StatusOr<CheckedProgram> CheckProgram(v1::Program program,
                                            const v1::PlanKey& key,
                                            uint32_t rank);

}  // namespace pipeweaver::client

#endif  // CLIENT_AGENTS_CC_PROGRAM_CHECK_H_
