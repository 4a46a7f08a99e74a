// The commands `pipeweaverctl schedule` and `pipeweaverctl simulate`: problem
// files in, schedules out.

#ifndef SERVER_CTL_SCHEDULE_COMMAND_H_
#define SERVER_CTL_SCHEDULE_COMMAND_H_

#include <ostream>
#include <string>
#include <vector>

namespace pipeweaver::server {

// Exit statuses of both commands.
inline constexpr int kExitOk = 0;
inline constexpr int kExitInternal = 1;
inline constexpr int kExitUsage = 2;
// The input is not well formed, or no schedule fits: one JSON object on `err`
// with error, field, value and rule.
inline constexpr int kExitBadInput = 3;

// schedule PROBLEM.json[.gz] [--budget-ms N | --budget-evals N] [--seed S]
//          [--threads T] [--strategy NAME]
// Writes the schedule to `out`. `args` start after the command's name.
int RunScheduleCommand(const std::vector<std::string>& args, std::ostream& out,
                       std::ostream& err);

// simulate PROBLEM SCHEDULE: times the schedule's order, checks it, and writes
// it with its times, makespan and peak memory to `out`.
int RunSimulateCommand(const std::vector<std::string>& args, std::ostream& out,
                       std::ostream& err);

}  // namespace pipeweaver::server

#endif  // SERVER_CTL_SCHEDULE_COMMAND_H_
