// The server as one object: core, handlers, gRPC and metrics page, started and
// drained.

#ifndef SERVER_SERVER_H_
#define SERVER_SERVER_H_

#include <prometheus/collectable.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/server_config.pb.h"
#include "search/planner.h"
#include "server/clock.h"
#include "server/planner_service.h"

namespace pipeweaver::server {

// Thread-safe.
class Server {
 public:
  // Starts serving. `config` is complete (CompleteConfig); what is passed by
  // plain pointer must outlive the server. `more_metrics` join the metrics
  // page. Errors: INVALID_ARGUMENT for files that cannot be read; UNAVAILABLE
  // when an address cannot be bound; RESOURCE_EXHAUSTED when the planner's
  // threads cannot be started.
  static absl::StatusOr<std::unique_ptr<Server>> Start(
      const v1::ServerConfig& config, const search::StepPlanner* planner,
      SimulateFunction simulate, Clock* clock,
      std::vector<std::shared_ptr<prometheus::Collectable>> more_metrics = {});

  // Drains.
  ~Server();

  // Addresses as bound: a port 0 of the config is the port that was found.
  const std::string& address() const;
  const std::string& metrics_address() const;

  // Calls begun and not ended.
  int calls_in_flight() const;

  // Says NOT_SERVING, takes no more calls, lets those in flight end for at most
  // drain_ms, and stops planning. Not to be called on a thread that serves.
  // Idempotent.
  void Drain();

 private:
  struct Parts;
  explicit Server(std::unique_ptr<Parts> parts);

  std::unique_ptr<Parts> parts_;
};

}  // namespace pipeweaver::server

#endif  // SERVER_SERVER_H_
