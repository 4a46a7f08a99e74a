#include "server/ctl/server_flags.h"

namespace pipeweaver::ctl {

void ServerFlags::AddTo(CLI::App& app) {
  app.add_option("--server", address, "address of the planner")
      ->capture_default_str();
  app.add_option("--ca-file", options.ca_file,
                 "PEM file of the authority that signed the server's "
                 "certificate; default: plaintext");
  app.add_option("--cert-file", options.cert_file,
                 "PEM file of the certificate that the server asks for");
  app.add_option("--key-file", options.key_file, "PEM file of its key");
  app.add_option("--tls-server-name", options.tls_server_name,
                 "name in the server's certificate; default: the address's");
  app.add_option("--token-file", options.token_file,
                 "file with the bearer token that the server asks for");
}

absl::StatusOr<client::PlannerClient> ServerFlags::Connect() const {
  return client::PlannerClient::Create(address, options);
}

}  // namespace pipeweaver::ctl
