// A server in the test's process, over real gRPC, with a puppet for a planner.

#ifndef SERVER_TESTING_TEST_SERVER_H_
#define SERVER_TESTING_TEST_SERVER_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <memory>
#include <string>

#include "pipeweaver/v1/planner_service.grpc.pb.h"
#include "pipeweaver/v1/server_config.pb.h"
#include "server/clock.h"
#include "server/server.h"
#include "server/testing/puppet_planner.h"

namespace pipeweaver::server {

// A job with one module of two layers on `ranks` ranks.
v1::Job SmallJob(const std::string& name, int ranks = 2);
// A batch for it: one microbatch with one item of `tokens` tokens.
v1::BatchMetadata SmallBatch(uint32_t tokens);

class TestServer {
 public:
  // Fields that `config` leaves out are set for a test: a port is found, two
  // planning threads, and no metrics page (it takes seconds to stop).
  explicit TestServer(v1::ServerConfig config = {});

  PuppetPlanner& planner() { return planner_; }
  Server& server() { return *server_; }
  v1::PlannerService::Stub& stub() { return *stub_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }

  // Registers SmallJob(name) and confirms its layout; returns what
  // RegisterJob answered.
  v1::RegisterJobResponse Register(const std::string& name,
                                   const std::string& request_id = "start");
  // A submission of SmallBatch(tokens).
  static v1::SubmitStepRequest Submission(
      const std::string& job, const v1::RegisterJobResponse& registered,
      uint64_t step, uint32_t tokens);
  grpc::Status Submit(const v1::SubmitStepRequest& request);

 private:
  PuppetPlanner planner_;
  SteadyClock clock_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::PlannerService::Stub> stub_;
};

}  // namespace pipeweaver::server

#endif  // SERVER_TESTING_TEST_SERVER_H_
