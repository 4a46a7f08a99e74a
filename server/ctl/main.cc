// pipeweaverctl: the planner's command line.

#include <iostream>
#include <string>
#include <vector>

#include "server/ctl/schedule_command.h"

int main(int argc, char** argv) {
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (!args.empty()) {
    const std::vector<std::string> rest(args.begin() + 1, args.end());
    if (args[0] == "schedule") {
      return pipeweaver::server::RunScheduleCommand(rest, std::cout, std::cerr);
    }
    if (args[0] == "simulate") {
      return pipeweaver::server::RunSimulateCommand(rest, std::cout, std::cerr);
    }
  }
  std::cerr << "usage: pipeweaverctl schedule|simulate ...\n";
  return pipeweaver::server::kExitUsage;
}
