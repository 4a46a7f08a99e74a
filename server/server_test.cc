// The server as a whole, in this process: addresses, TLS, tokens, health,
// drain, garbage.

#include "server/server.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <future>
#include <iterator>
#include <optional>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "client_agents/cc/planner_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/config.h"
#include "server/testing/certificate.h"
#include "server/testing/raw_connection.h"
#include "server/testing/raw_stream.h"
#include "server/testing/test_server.h"

namespace pipeweaver::server {
namespace {

using ::grpc::StatusCode;
using ::testing::HasSubstr;
using ::testing::Optional;

std::string Temp(const std::string& name) {
  return ::testing::TempDir() + "/" + name;
}

client::PlannerClientOptions Patience(int milliseconds = 10'000) {
  client::PlannerClientOptions options;
  options.call_timeout = std::chrono::milliseconds(milliseconds);
  return options;
}

absl::Status ListJobs(const std::string& address,
                      const client::PlannerClientOptions& options) {
  auto client = client::PlannerClient::Create(address, options);
  if (!client.ok()) return client.status();
  return client->ListJobs({}).status();
}

void ExpectCannotServe(v1::ServerConfig config) {
  config.set_metrics_address("none");
  PuppetPlanner planner;
  SteadyClock clock;
  config.set_planner_threads(1);
  config.set_max_queued(1);
  config.set_max_jobs(1);
  config.set_drain_ms(1);
  const auto second = Server::Start(config, &planner, nullptr, &clock);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(second.status().message()),
              HasSubstr("listen_address: cannot bind"));
}

TEST(ServerTest, ServesOnAUnixSocket) {
  v1::ServerConfig config;
  // Not in the test's folder: a socket's path is 107 characters at most.
  config.set_listen_address("unix:/tmp/pipeweaver_" + std::to_string(getpid()) +
                            ".sock");
  TestServer server(config);
  EXPECT_EQ(server.server().address(), config.listen_address());
  EXPECT_TRUE(ListJobs(config.listen_address(), Patience()).ok());
  // A second one does not take its place, nor its socket with it.
  ExpectCannotServe(config);
  EXPECT_TRUE(ListJobs(config.listen_address(), Patience()).ok());
}

TEST(ServerTest, ServesOnASocketThatAnotherServerLeftBehind) {
  const std::string path =
      "/tmp/pipeweaver_" + std::to_string(getpid()) + "_left.sock";
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  path.copy(name.sun_path, sizeof(name.sun_path) - 1);
  const int left = socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(bind(left, reinterpret_cast<const sockaddr*>(&name), sizeof(name)),
            0);
  close(left);
  v1::ServerConfig config;
  config.set_listen_address("unix:" + path);
  TestServer server(config);
  EXPECT_TRUE(ListJobs(config.listen_address(), Patience()).ok());
}

TEST(ServerTest, TwoServersDoNotShareAPort) {
  TestServer first;
  v1::ServerConfig config;
  config.set_listen_address(first.server().address());
  ExpectCannotServe(config);
}

TEST(ServerTest, ATokenIsAskedFor) {
  std::ofstream(Temp("token")) << "0123456789abcdef\n";
  std::ofstream(Temp("wrong")) << "0123456789abcdeX\n";
  v1::ServerConfig config;
  config.set_token_file(Temp("token"));
  TestServer server(config);
  const std::string& address = server.server().address();
  client::PlannerClientOptions options = Patience();
  EXPECT_EQ(ListJobs(address, options).code(),
            absl::StatusCode::kUnauthenticated);
  options.token_file = Temp("wrong");
  EXPECT_EQ(ListJobs(address, options).code(),
            absl::StatusCode::kUnauthenticated);
  options.token_file = Temp("token");
  EXPECT_TRUE(ListJobs(address, options).ok());
}

TEST(ServerTest, TlsIsMutualWhenAskedFor) {
  if (!MakeCertificate(Temp("server")) || !MakeCertificate(Temp("client")) ||
      !MakeCertificate(Temp("stranger"))) {
    GTEST_SKIP() << "skipped: the openssl command is missing";
  }
  v1::ServerConfig config;
  config.set_cert_file(Temp("server.pem"));
  config.set_key_file(Temp("server.key"));
  config.set_client_ca_file(Temp("client.pem"));
  TestServer server(config);
  const std::string& address = server.server().address();
  client::PlannerClientOptions options = Patience();
  options.ca_file = Temp("server.pem");
  options.tls_server_name = "localhost";
  options.cert_file = Temp("client.pem");
  options.key_file = Temp("client.key");
  const absl::Status status = ListJobs(address, options);
  EXPECT_TRUE(status.ok()) << status;

  options.call_timeout = std::chrono::milliseconds(500);
  options.cert_file = Temp("stranger.pem");
  options.key_file = Temp("stranger.key");
  EXPECT_FALSE(ListJobs(address, options).ok());
  options.cert_file.clear();
  options.key_file.clear();
  EXPECT_FALSE(ListJobs(address, options).ok());
  EXPECT_FALSE(ListJobs(address, Patience(500)).ok());

  config.set_client_ca_file(Temp("client.key"));
  EXPECT_THAT(std::string(CompleteConfig(config).status().message()),
              HasSubstr("client_ca_file: '" + Temp("client.key") +
                        "' holds no certificate"));
}

TEST(ServerTest, AKeyOfAnotherCertificateIsRefused) {
  if (!MakeCertificate(Temp("one")) || !MakeCertificate(Temp("two"))) {
    GTEST_SKIP() << "skipped: the openssl command is missing";
  }
  v1::ServerConfig config;
  config.set_cert_file(Temp("one.pem"));
  config.set_key_file(Temp("two.key"));
  const absl::Status status = CompleteConfig(config).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("does not hold the key of the certificate"));
  config.set_key_file(Temp("one.key"));
  EXPECT_TRUE(CompleteConfig(config).ok());
}

TEST(ServerTest, ANewCertificateIsTakenWithoutARestart) {
  if (!MakeCertificate(Temp("rotated")) || !MakeCertificate(Temp("next"))) {
    GTEST_SKIP() << "skipped: the openssl command is missing";
  }
  v1::ServerConfig config;
  config.set_cert_file(Temp("rotated.pem"));
  config.set_key_file(Temp("rotated.key"));
  TestServer server(config);
  const std::string& address = server.server().address();
  client::PlannerClientOptions options = Patience();
  options.tls_server_name = "localhost";
  options.ca_file = Temp("rotated.pem");
  ASSERT_TRUE(ListJobs(address, options).ok());

  // A client that trusts what the server does not have yet.
  std::ifstream in(Temp("next.pem"));
  grpc::SslCredentialsOptions trust;
  trust.pem_root_certs.assign(std::istreambuf_iterator<char>(in), {});
  grpc::ChannelArguments arguments;
  arguments.SetSslTargetNameOverride("localhost");
  const auto channel = grpc::CreateCustomChannel(
      address, grpc::SslCredentials(trust), arguments);
  const auto now = [] { return std::chrono::system_clock::now(); };
  ASSERT_FALSE(
      channel->WaitForConnected(now() + std::chrono::milliseconds(300)));

  std::filesystem::rename(Temp("next.key"), Temp("rotated.key"));
  std::filesystem::rename(Temp("next.pem"), Temp("rotated.pem"));
  // The server looks at the files every ten seconds.
  EXPECT_TRUE(channel->WaitForConnected(now() + std::chrono::seconds(60)));
}

// grpc.health.v1's Check by hand: its service has no C++ header in Debian.
std::string HealthOf(TestServer& server) {
  grpc::GenericStub stub(server.channel());
  grpc::ByteBuffer request;
  const grpc::Slice empty;
  request = grpc::ByteBuffer(&empty, 1);
  grpc::ByteBuffer response;
  grpc::ClientContext context;
  std::promise<grpc::Status> done;
  stub.UnaryCall(&context, "/grpc.health.v1.Health/Check", grpc::StubOptions(),
                 &request, &response, [&done](const grpc::Status& status) {
                   done.set_value(status);
                 });
  if (!done.get_future().get().ok()) return "no answer";
  grpc::Slice slice;
  if (!response.DumpToSingleSlice(&slice).ok()) return "no answer";
  // Field 1, the enum ServingStatus.
  const std::string bytes(reinterpret_cast<const char*>(slice.begin()),
                          slice.size());
  return bytes == "\x08\x01" ? "SERVING" : "NOT_SERVING";
}

TEST(ServerTest, HealthNeedsNoToken) {
  std::ofstream(Temp("token")) << "0123456789abcdef\n";
  v1::ServerConfig config;
  config.set_token_file(Temp("token"));
  TestServer server(config);
  EXPECT_EQ(HealthOf(server), "SERVING");
}

TEST(ServerTest, ReflectionIsThereWhenAskedFor) {
  const std::string method =
      "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  // Field 7, which asks for all services.
  const std::string list_services = "\x3a\x01*";
  v1::ServerConfig config;
  config.set_reflection(true);
  TestServer server(config);
  RawStream call(server.channel(), method);
  call.WriteLast(list_services);
  EXPECT_THAT(call.Read(), Optional(HasSubstr("pipeweaver.v1.PlannerService")));

  TestServer without;
  RawStream refused(without.channel(), method);
  refused.WriteLast(list_services);
  EXPECT_EQ(refused.Read(), std::nullopt);
  EXPECT_EQ(refused.Finish().error_code(), StatusCode::UNIMPLEMENTED);
}

TEST(ServerTest, DrainLetsWaitingReadsEnd) {
  TestServer server;
  server.planner().HoldPlans();
  const v1::RegisterJobResponse job = server.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  ASSERT_TRUE(server.Submit(step).ok());
  server.planner().WaitForPlans(1);
  auto client =
      *client::PlannerClient::Create(server.server().address(), Patience());
  auto read = std::async(std::launch::async,
                         [&] { return client.GetProgram(step.key(), 0); });
  // Until the read is in the server, or it would be refused like a late one.
  while (server.server().calls_in_flight() == 0) std::this_thread::yield();
  auto drained =
      std::async(std::launch::async, [&] { server.server().Drain(); });
  server.planner().Finish(77);
  const absl::StatusOr<v1::Program> program = read.get();
  EXPECT_TRUE(program.ok()) << program.status();
  drained.get();
  EXPECT_EQ(ListJobs(server.server().address(), Patience(200)).code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST(ServerTest, HealthWatchersHearOfTheDrainAndDoNotHoldItUp) {
  const std::string serving = "\x08\x01";
  const std::string not_serving = "\x08\x02";
  v1::ServerConfig config;
  config.set_drain_ms(60'000);
  TestServer server(config);
  server.planner().HoldPlans();
  const v1::RegisterJobResponse job = server.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  ASSERT_TRUE(server.Submit(step).ok());
  server.planner().WaitForPlans(1);
  auto client =
      *client::PlannerClient::Create(server.server().address(), Patience());
  auto read = std::async(std::launch::async,
                         [&] { return client.GetProgram(step.key(), 0); });
  while (server.server().calls_in_flight() == 0) std::this_thread::yield();

  RawStream watch(server.channel(), "/grpc.health.v1.Health/Watch");
  watch.WriteLast("");
  EXPECT_EQ(watch.Read(), serving);
  auto drained =
      std::async(std::launch::async, [&] { server.server().Drain(); });
  // While the read still waits for its plan.
  EXPECT_EQ(watch.Read(), not_serving);
  server.planner().Finish(77);
  EXPECT_TRUE(read.get().ok());
  // Long before the drain's own limit, which is past the stream's.
  EXPECT_EQ(watch.Read(), std::nullopt);
  EXPECT_NE(watch.Finish().error_code(), StatusCode::DEADLINE_EXCEEDED);
  drained.get();
}

TEST(ServerTest, DrainIsBounded) {
  v1::ServerConfig config;
  config.set_drain_ms(100);
  TestServer server(config);
  server.planner().HoldPlans();
  const v1::RegisterJobResponse job = server.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  ASSERT_TRUE(server.Submit(step).ok());
  server.planner().WaitForPlans(1);
  grpc::ClientContext context;
  v1::GetPlanRequest request;
  *request.mutable_key() = step.key();
  v1::GetPlanResponse response;
  auto read = std::async(std::launch::async, [&] {
    return server.stub().GetPlan(&context, request, &response);
  });
  while (server.server().calls_in_flight() == 0) std::this_thread::yield();
  server.server().Drain();
  EXPECT_FALSE(read.get().ok());
}

TEST(ServerTest, AConnectionWithoutCallsIsProbed) {
  v1::ServerConfig config;
  config.set_keepalive_seconds(1);
  TestServer server(config);
  RawConnection connection(server.server().address());
  // By default gRPC stops after two.
  for (int pings = 0; pings < 3;) {
    const std::optional<RawConnection::Frame> frame = connection.Read();
    ASSERT_TRUE(frame.has_value()) << "no ping for 30 s";
    if (frame->type != RawConnection::kPing) continue;
    ++pings;
    connection.Write(RawConnection::kPing, RawConnection::kAck, 0,
                     frame->payload);
  }
}

// Calls lie outside the memory that gRPC counts.
TEST(ServerTest, AConnectionWithTooManyCallsIsClosed) {
  TestServer server;
  RawConnection connection(server.server().address());
  std::optional<RawConnection::Frame> frame = connection.Read();
  while (frame.has_value() && (frame->type != RawConnection::kSettings ||
                               frame->flags == RawConnection::kAck)) {
    frame = connection.Read();
  }
  ASSERT_TRUE(frame.has_value());
  connection.Write(RawConnection::kSettings, RawConnection::kAck, 0, "");
  // Each waits for its message.
  for (uint32_t call = 0; call <= 4096; ++call) {
    connection.BeginCall(2 * call + 1,
                         "/pipeweaver.v1.PlannerService/ListJobs");
  }
  while (connection.Read().has_value()) {
  }
  EXPECT_TRUE(connection.ended());
  EXPECT_TRUE(ListJobs(server.server().address(), Patience()).ok());
}

int64_t ResidentBytes() {
  std::ifstream in("/proc/self/statm");
  int64_t size = 0;
  int64_t resident = 0;
  in >> size >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

// Random bytes, and random changes to good requests, at every method.
TEST(ServerTest, TenThousandGarbageCallsNeitherCrashNorGrowIt) {
  TestServer server;
  const v1::RegisterJobResponse job = server.Register("vlm");
  v1::RegisterJobRequest registration;
  registration.set_request_id("start");
  *registration.mutable_job() = SmallJob("garbage");
  v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  v1::GetProgramRequest program;
  *program.mutable_key() = step.key();
  const std::vector<std::string> good = {registration.SerializeAsString(),
                                         step.SerializeAsString(),
                                         program.SerializeAsString()};
  const char* const methods[] = {
      "RegisterJob", "ConfirmLayout", "DescribeJob",       "ListJobs",
      "RemoveJob",   "SubmitStep",    "CancelStep",        "GetPlan",
      "GetProgram",  "ReportStep",    "CompareStrategies", "SimulatePlan"};
  grpc::GenericStub stub(server.channel());
  std::mt19937 random(1);
  const auto call = [&] {
    std::string bytes = good[random() % good.size()];
    if (random() % 4 == 0) {
      bytes.resize(random() % 200);
      for (char& c : bytes) c = static_cast<char>(random());
    } else {
      for (uint32_t changes = random() % 8; changes > 0; --changes) {
        bytes[random() % bytes.size()] = static_cast<char>(random());
      }
    }
    const grpc::Slice slice(bytes);
    const grpc::ByteBuffer request(&slice, 1);
    grpc::ByteBuffer response;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::seconds(20));
    std::promise<grpc::Status> done;
    stub.UnaryCall(
        &context,
        std::string("/pipeweaver.v1.PlannerService/") +
            methods[random() % std::size(methods)],
        grpc::StubOptions(), &request, &response,
        [&done](const grpc::Status& status) { done.set_value(status); });
    return done.get_future().get();
  };
  // What is cached, pooled or counted once is there after the first part.
  for (int i = 0; i < 4'000; ++i) {
    EXPECT_NE(call().error_code(), StatusCode::UNAVAILABLE);
  }
  const int64_t before = ResidentBytes();
  for (int i = 0; i < 10'000; ++i) {
    EXPECT_NE(call().error_code(), StatusCode::UNAVAILABLE);
  }
  EXPECT_LT(ResidentBytes() - before, 8 << 20);
  EXPECT_TRUE(ListJobs(server.server().address(), Patience()).ok());
}

}  // namespace
}  // namespace pipeweaver::server
