// pipeweaverctl: schedules problem files, plans and compares batches, and asks
// a running planner about its jobs.

#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "semu/base/version.h"
#include "server/ctl/command.h"
#include "server/ctl/profile_command.h"
#include "server/ctl/schedule_command.h"

namespace pipeweaver::ctl {
namespace {

struct Command {
  absl::string_view name;
  absl::string_view summary;
  int (*run)(absl::Span<const std::string> args, const CommandIo& io);
};

constexpr Command kCommands[] = {
    {"schedule", "solve a problem file, print the schedule",
     RunScheduleCommand},
    {"simulate", "time a given schedule of a problem file", RunSimulateCommand},
    {"setups", "list the built-in jobs, write one with sample batches",
     RunSetupsCommand},
    {"plan", "plan a batch of a job here, without a server", RunPlanCommand},
    {"compare", "plan a batch with several strategies", RunCompareCommand},
    {"replay", "plan a saved request again and compare the bytes",
     RunReplayCommand},
    {"trace", "draw a plan: Chrome trace and SVG picture", RunTraceCommand},
    {"profile", "import measured traces, predict op times", RunProfileCommand},
    {"job", "register, list, describe, remove jobs of a running planner",
     RunJobCommand},
};

void PrintHelp(std::ostream& out) {
  out << "usage: pipeweaverctl COMMAND [ARGUMENT...]\n\n";
  for (const Command& command : kCommands) {
    out << "  " << command.name << std::string(10 - command.name.size(), ' ')
        << command.summary << "\n";
  }
  out << "\n`pipeweaverctl COMMAND --help` tells more, "
         "`pipeweaverctl --version` the version.\n\n"
         "Exit codes: 0 done; 1 the answer is no (a check failed, bytes "
         "differ);\n2 wrong arguments; 3 an input breaks a rule or has no "
         "valid schedule;\n4 the server cannot be reached, did not answer or "
         "asks for a token.\n";
}

int Main(absl::Span<const std::string> args) {
  if (args.empty()) {
    PrintHelp(std::cerr);
    return kExitUsage;
  }
  if (args[0] == "help" || args[0] == "--help" || args[0] == "-h") {
    PrintHelp(std::cout);
    return kExitOk;
  }
  if (args[0] == "--version") {
    std::cout << "pipeweaver " << kVersion << "\n";
    return kExitOk;
  }
  for (const Command& command : kCommands) {
    if (command.name == args[0]) {
      const int code =
          command.run(args.subspan(1), CommandIo{std::cout, std::cerr});
      std::cout.flush();
      if (!std::cout) {
        std::cerr << "error: cannot write the output\n";
        return kExitFailed;
      }
      return code;
    }
  }
  std::cerr << "error: no command '" << args[0]
            << "'; `pipeweaverctl help` lists them\n";
  return kExitUsage;
}

}  // namespace
}  // namespace pipeweaver::ctl

int main(int argc, char** argv) {
  return pipeweaver::ctl::Main(std::vector<std::string>(argv + 1, argv + argc));
}
