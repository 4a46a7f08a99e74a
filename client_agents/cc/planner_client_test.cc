// The client against a server that misbehaves as told.

#include "client_agents/cc/planner_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "pipeweaver/v1/planner_service.grpc.pb.h"
#include "proto/digest/digest.h"

namespace pipeweaver::client {
namespace {

using ::testing::HasSubstr;

class FakeService final : public v1::PlannerService::Service {
 public:
  FakeService() {
    program.mutable_identity()->mutable_key()->set_job("vlm");
    program.mutable_identity()->mutable_key()->set_step(3);
    program.set_rank(0);
    program.set_actions(std::string(1000, 'a'));
    program.add_rank_digests(Sha256(program.actions()));
    program.set_plan_digest(PlanDigest(program.identity(), program.split(),
                                       {program.rank_digests(0)}));
  }

  grpc::Status GetProgram(grpc::ServerContext*,
                          const v1::GetProgramRequest* request,
                          v1::GetProgramResponse* response) override {
    ++calls;
    const std::string bytes = program.SerializeAsString();
    response->set_total_bytes(bytes.size());
    const size_t most = request->max_bytes() == 0 ? 400 : request->max_bytes();
    response->set_data(bytes.substr(request->offset(), most));
    if (spoil != nullptr) spoil(response);
    return grpc::Status::OK;
  }

  grpc::Status ListJobs(grpc::ServerContext*, const v1::ListJobsRequest*,
                        v1::ListJobsResponse* response) override {
    ++calls;
    if (unavailable-- > 0) {
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "drains");
    }
    response->add_jobs("vlm");
    return grpc::Status::OK;
  }

  grpc::Status RemoveJob(grpc::ServerContext*, const v1::RemoveJobRequest*,
                         v1::RemoveJobResponse*) override {
    ++calls;
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "drains");
  }

  grpc::Status DescribeJob(grpc::ServerContext*, const v1::DescribeJobRequest*,
                           v1::DescribeJobResponse*) override {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "job: 'vlm' is unknown");
  }

  // Waits longer than its client.
  grpc::Status GetPlan(grpc::ServerContext* context, const v1::GetPlanRequest*,
                       v1::GetPlanResponse*) override {
    while (!context->IsCancelled()) std::this_thread::yield();
    return grpc::Status::CANCELLED;
  }

  v1::Program program;
  std::function<void(v1::GetProgramResponse*)> spoil;
  std::atomic<int> calls = 0;
  std::atomic<int> unavailable = 0;
};

class PlannerClientTest : public ::testing::Test {
 protected:
  PlannerClientTest() {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(),
                             &port_);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
  }

  PlannerClient Client(const PlannerClientOptions& options = {}) {
    return *PlannerClient::Create("127.0.0.1:" + std::to_string(port_),
                                  options);
  }
  absl::StatusOr<v1::Program> GetProgram(uint32_t rank = 0) {
    return Client().GetProgram(service_.program.identity().key(), rank);
  }

  int port_ = 0;
  FakeService service_;
  std::unique_ptr<grpc::Server> server_;
};

TEST_F(PlannerClientTest, PutsChunksTogether) {
  const auto program = GetProgram();
  ASSERT_TRUE(program.ok()) << program.status();
  EXPECT_EQ(program->SerializeAsString(), service_.program.SerializeAsString());
  EXPECT_GE(service_.calls, 3);
  PlannerClientOptions options;
  options.chunk_bytes = 100;
  EXPECT_TRUE(
      Client(options).GetProgram(service_.program.identity().key(), 0).ok());
  EXPECT_GE(service_.calls, 13);
}

TEST_F(PlannerClientTest, RefusesWhatIsNotWhole) {
  const auto ExpectLoss = [this](const char* message) {
    const absl::Status status = GetProgram().status();
    EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(message));
  };
  service_.spoil = [](v1::GetProgramResponse* r) { r->clear_data(); };
  ExpectLoss("data: 0 bytes");
  service_.spoil = [](v1::GetProgramResponse* r) { r->set_total_bytes(10); };
  ExpectLoss("of a program of 10 bytes");
  service_.spoil = [](v1::GetProgramResponse* r) {
    r->set_total_bytes(uint64_t{1} << 60);
  };
  ExpectLoss("data:");
  service_.spoil = [](v1::GetProgramResponse* r) {
    std::string& data = *r->mutable_data();
    std::replace(data.begin(), data.end(), 'a', 'b');
  };
  ExpectLoss("actions");
}

TEST_F(PlannerClientTest, RefusesWhatWasNotAskedFor) {
  EXPECT_THAT(std::string(GetProgram(1).status().message()),
              HasSubstr("rank: the program is for rank 0, not 1"));
  v1::PlanKey key = service_.program.identity().key();
  key.set_step(4);
  const absl::Status status = Client().GetProgram(key, 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(status.message()), HasSubstr("identity.key"));
}

TEST_F(PlannerClientTest, TriesAgainWhereThatIsHarmless) {
  service_.unavailable = 2;
  const auto jobs = Client().ListJobs({});
  ASSERT_TRUE(jobs.ok()) << jobs.status();
  EXPECT_EQ(service_.calls, 3);
  service_.calls = 0;
  EXPECT_EQ(Client().RemoveJob({}).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(service_.calls, 1);
}

TEST_F(PlannerClientTest, PassesErrorsAndDeadlinesOn) {
  const absl::Status status = Client().DescribeJob({}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), "job: 'vlm' is unknown");
  PlannerClientOptions options;
  options.call_timeout = std::chrono::milliseconds(50);
  EXPECT_EQ(Client(options).GetPlan({}).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST(PlannerClientCreateTest, ChecksItsOptions) {
  EXPECT_EQ(PlannerClient::Create("", {}).status().code(),
            absl::StatusCode::kInvalidArgument);
  PlannerClientOptions options;
  options.token_file = "/nonexistent";
  EXPECT_THAT(
      std::string(PlannerClient::Create("a:1", options).status().message()),
      HasSubstr("token_file"));
  options.token_file = ::testing::TempDir();
  EXPECT_THAT(
      std::string(PlannerClient::Create("a:1", options).status().message()),
      HasSubstr("must be a file that is not empty"));
  options = {};
  options.cert_file = "c";
  EXPECT_FALSE(PlannerClient::Create("a:1", options).ok());
}

}  // namespace
}  // namespace pipeweaver::client
