// The server's configuration: text in, defaults filled in, rules checked.

#ifndef SERVER_CONFIG_H_
#define SERVER_CONFIG_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pipeweaver/v1/profile.pb.h"
#include "pipeweaver/v1/server_config.pb.h"
#include "server/planner_core.h"

namespace pipeweaver::server {

struct LoadedProfile {
  std::string job;
  v1::Profile profile;
};

// Parses a config in protobuf text; `path` is for messages. Errors:
// INVALID_ARGUMENT with line and column.
absl::StatusOr<v1::ServerConfig> ParseConfig(absl::string_view text,
                                             absl::string_view path);

// The config with every default filled in. Reads the files that it names.
// Errors: INVALID_ARGUMENT naming field, value and rule.
absl::StatusOr<v1::ServerConfig> CompleteConfig(v1::ServerConfig config);

// The profiles of a config, read and checked. Errors: INVALID_ARGUMENT naming
// field, value and rule.
absl::StatusOr<std::vector<LoadedProfile>> LoadProfiles(
    const v1::ServerConfig& config);

// What the core takes of a complete config, but the measured layers.
PlannerCoreOptions CoreOptions(const v1::ServerConfig& config);

}  // namespace pipeweaver::server

#endif  // SERVER_CONFIG_H_
