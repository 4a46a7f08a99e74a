// `pipeweaverctl profile ...`: measured costs, from traces and from rules.

#ifndef SERVER_CTL_PROFILE_COMMAND_H_
#define SERVER_CTL_PROFILE_COMMAND_H_

#include <string>

#include "absl/types/span.h"
#include "server/ctl/command.h"

namespace pipeweaver::ctl {

// Runs one command, the words after "profile" in `args`:
//   import [-o json|table] [--profile FILE [--profile-version N]]
//   TRACE.json[.gz]...
//     Figures of every trace (several as a JSON list); with --profile also the
//     measured points of all, taken as ranks of one run, to a new textproto
//     file.
//   predict OPS.csv[.gz]
//     The op table with the times that the op cost rules predict.
// Returns an ExitCode. Results go to io.out only if all went well; what was
// left out of a trace, and errors, to io.err.
int RunProfileCommand(absl::Span<const std::string> args, const CommandIo& io);

}  // namespace pipeweaver::ctl

#endif  // SERVER_CTL_PROFILE_COMMAND_H_
