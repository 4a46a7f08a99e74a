// What --help and --version say.

#ifndef SEMU_BASE_FLAGS_HELP_H_
#define SEMU_BASE_FLAGS_HELP_H_

#include <string>
#include <utility>

#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "semu/base/version.h"

namespace pipeweaver {

// Makes --help print `usage` and the flags of the source file whose path ends
// in `file` (Abseil looks for one that is called as the program), and --version
// the version. Call once, before flags are parsed.
inline void SetHelp(absl::string_view usage, std::string file) {
  absl::SetProgramUsageMessage(usage);
  absl::FlagsUsageConfig config;
  config.contains_help_flags = config.contains_helpshort_flags =
      [file = std::move(file)](absl::string_view path) {
        return absl::EndsWith(path, file);
      };
  config.version_string = [] {
    return absl::StrCat("pipeweaver ", kVersion, "\n");
  };
  absl::SetFlagsUsageConfig(std::move(config));
}

}  // namespace pipeweaver

#endif  // SEMU_BASE_FLAGS_HELP_H_
