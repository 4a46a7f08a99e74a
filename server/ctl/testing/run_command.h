// Runs a command of pipeweaverctl in the test's process.

#ifndef SERVER_CTL_TESTING_RUN_COMMAND_H_
#define SERVER_CTL_TESTING_RUN_COMMAND_H_

#include <sstream>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "server/ctl/command.h"

namespace pipeweaver::ctl {

struct Outcome {
  int code;
  std::string out;
  std::string err;
};

inline Outcome Ctl(int (*command)(absl::Span<const std::string>,
                                  const CommandIo&),
                   const std::vector<std::string>& args) {
  std::ostringstream out;
  std::ostringstream err;
  const int code = command(args, {out, err});
  return {code, out.str(), err.str()};
}

}  // namespace pipeweaver::ctl

#endif  // SERVER_CTL_TESTING_RUN_COMMAND_H_
