// The commands `pipeweaverctl schedule` and `pipeweaverctl simulate`: problem
// files in, schedules out.

#ifndef SERVER_CTL_SCHEDULE_COMMAND_H_
#define SERVER_CTL_SCHEDULE_COMMAND_H_

#include <string>

#include "absl/types/span.h"
#include "server/ctl/command.h"

namespace pipeweaver::ctl {

// An input that is not well formed, or that no schedule fits, ends both with
// kExitBadInput and one JSON object on `io.err`: error, field, value and rule.

// schedule PROBLEM.json[.gz] [--budget-ms N | --budget-evals N] [--seed S]
//          [--threads T] [--strategy NAME]
// Writes the schedule. `args` start after the command's name.
int RunScheduleCommand(absl::Span<const std::string> args, const CommandIo& io);

// simulate PROBLEM SCHEDULE: times the schedule's order, checks it, and writes
// it with its times, makespan and peak memory.
int RunSimulateCommand(absl::Span<const std::string> args, const CommandIo& io);

}  // namespace pipeweaver::ctl

#endif  // SERVER_CTL_SCHEDULE_COMMAND_H_
