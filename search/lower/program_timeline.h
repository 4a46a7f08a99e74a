// Programs as a timeline for pictures and traces: of a plan at hand, and of one
// that came as bytes.

#ifndef SEARCH_LOWER_PROGRAM_TIMELINE_H_
#define SEARCH_LOWER_PROGRAM_TIMELINE_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "search/lower/program.h"
#include "search/lower/program_proto.h"
#include "search/partition/step_problem.h"
#include "semu/trace/timeline.h"

namespace pipeweaver::search {

// Spans and transfers by the predicted times of the actions. Title, subtitle
// and memory (PlanEvaluator::Memory) are left to the caller.
//
// REQUIRES: the programs passed CheckPrograms on `step`; a name a module.
semu::Timeline ProgramTimeline(const StepProblem& step,
                               const StepPrograms& programs,
                               const std::vector<std::string>& modules);

// The same of parsed programs, one a rank. A module without a name is called by
// its number. Errors: INVALID_ARGUMENT when programs of a rank are missing,
// stand twice, or belong to different plans.
absl::StatusOr<semu::Timeline> ProgramTimeline(
    const std::vector<ParsedProgram>& programs,
    const std::vector<std::string>& modules);

}  // namespace pipeweaver::search

#endif  // SEARCH_LOWER_PROGRAM_TIMELINE_H_
