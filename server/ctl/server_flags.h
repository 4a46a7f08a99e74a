// The flags of a connection to a planner, the same for all commands that make
// one.

#ifndef SERVER_CTL_SERVER_FLAGS_H_
#define SERVER_CTL_SERVER_FLAGS_H_

#include <string>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "client_agents/cc/planner_client.h"

namespace pipeweaver::ctl {

struct ServerFlags {
  std::string address = "127.0.0.1:7411";
  client::PlannerClientOptions options;

  void AddTo(CLI::App& app);

  // Errors: see PlannerClient::Create.
  absl::StatusOr<client::PlannerClient> Connect() const;
};

}  // namespace pipeweaver::ctl

#endif  // SERVER_CTL_SERVER_FLAGS_H_
