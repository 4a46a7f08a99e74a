// `pipeweaverctl profile ...`: measured costs, from traces and from rules.

#ifndef SERVER_CTL_PROFILE_COMMAND_H_
#define SERVER_CTL_PROFILE_COMMAND_H_

#include <ostream>
#include <string>
#include <vector>

namespace pipeweaver::server {

// Runs one command, the words after "profile" in `args`:
//   import [-o json|text] [--profile=FILE] [--version=N] TRACE.json[.gz]...
//     Figures of every trace (several as a JSON list); with --profile also the
//     measured points of all, taken as ranks of one run, to a new textproto
//     file.
//   predict OPS.csv[.gz]
//     The op table with the times that the op cost rules predict.
// Returns the exit code: 0, 1 for a failure, 2 for a wrong call. Results go to
// `out` only if all went well; what was left out of a trace, and errors, to
// `err`.
int RunProfileCommand(const std::vector<std::string>& args, std::ostream& out,
                      std::ostream& err);

}  // namespace pipeweaver::server

#endif  // SERVER_CTL_PROFILE_COMMAND_H_
