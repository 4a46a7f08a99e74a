// The commands that ask a running planner, against a server in this process.

#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "pipeweaver/v1/planner_service.pb.h"
#include "server/ctl/command.h"
#include "server/ctl/planning_input.h"
#include "server/ctl/testing/run_command.h"
#include "server/testing/certificate.h"
#include "server/testing/test_server.h"

namespace pipeweaver::ctl {
namespace {

using server::MakeCertificate;
using server::SmallBatch;
using server::SmallJob;
using server::TestServer;
using ::testing::HasSubstr;
using ::testing::Not;

std::string Temp(const std::string& name) {
  return ::testing::TempDir() + "/" + name;
}

// `pipeweaverctl job ARGS... --server ADDRESS`.
Outcome Job(TestServer& server, std::vector<std::string> args) {
  args.insert(args.end(), {"--server", server.server().address()});
  return Ctl(RunJobCommand, args);
}

TEST(JobCommandTest, TheLifeOfAJob) {
  TestServer server;
  ASSERT_TRUE(WriteTextProto(Temp("job"), SmallJob("vlm")).ok());
  ASSERT_TRUE(WriteTextProto(Temp("sample"), SmallBatch(7)).ok());
  const Outcome registered =
      Job(server, {"register", Temp("job"), "--request-id", "start",
                   "--sample-batch", Temp("sample"), Temp("sample")});
  EXPECT_EQ(registered.code, kExitOk) << registered.err;
  EXPECT_THAT(registered.out, HasSubstr("vlm: attempt "));
  EXPECT_THAT(Job(server, {"list"}).out, HasSubstr("vlm"));
  const Outcome described = Job(server, {"describe", "vlm"});
  EXPECT_EQ(described.code, kExitOk) << described.err;
  EXPECT_THAT(described.out, HasSubstr("layout confirmed"));

  const v1::RegisterJobResponse again = server.Register("vlm", "restart");
  ASSERT_TRUE(server.Submit(TestServer::Submission("vlm", again, 3, 77)).ok());
  const Outcome plan = Job(server, {"plan", "vlm", "3"});
  EXPECT_EQ(plan.code, kExitOk) << plan.err;
  EXPECT_THAT(plan.out, HasSubstr("makespan"));
  const std::string digest = absl::BytesToHexString(again.layout_digest());
  for (const std::vector<std::string>& args :
       std::vector<std::vector<std::string>>{
           {"describe", "vlm", "-o", "json"},
           {"plan", "vlm", "3", "-o", "json"}}) {
    EXPECT_THAT(Job(server, args).out,
                HasSubstr(absl::StrCat("\"layout_digest\":\"", digest, "\"")));
  }

  EXPECT_EQ(Job(server, {"remove", "vlm"}).code, kExitOk);
  EXPECT_THAT(Job(server, {"list"}).out, Not(HasSubstr("vlm")));
  const Outcome gone = Job(server, {"describe", "vlm"});
  EXPECT_EQ(gone.code, kExitBadInput);
  EXPECT_THAT(gone.err, HasSubstr("job: 'vlm' is not registered"));
}

TEST(JobCommandTest, ASampleThatBreaksARuleIsNamed) {
  TestServer server;
  ASSERT_TRUE(WriteTextProto(Temp("job"), SmallJob("vlm")).ok());
  ASSERT_TRUE(WriteTextProto(Temp("empty"), v1::BatchMetadata()).ok());
  const std::vector<std::string> args = {"register",       Temp("job"),
                                         "--request-id",   "start",
                                         "--sample-batch", Temp("empty")};
  const Outcome refused = Job(server, args);
  EXPECT_EQ(refused.code, kExitBadInput);
  EXPECT_THAT(refused.err, HasSubstr("sample_batches[0]"));
  EXPECT_THAT(Job(server, {"list"}).out, Not(HasSubstr("vlm")));
}

TEST(JobCommandTest, AGuardedServerIsReachedByItsFlags) {
  if (!MakeCertificate(Temp("server")) || !MakeCertificate(Temp("client"))) {
    GTEST_SKIP() << "skipped: the openssl command is missing";
  }
  std::ofstream(Temp("token")) << "0123456789abcdef\n";
  v1::ServerConfig config;
  config.set_cert_file(Temp("server.pem"));
  config.set_key_file(Temp("server.key"));
  config.set_client_ca_file(Temp("client.pem"));
  config.set_token_file(Temp("token"));
  TestServer server(config);
  std::vector<std::string> args = {"list",
                                   "--tls-server-name",
                                   "localhost",
                                   "--ca-file",
                                   Temp("server.pem"),
                                   "--cert-file",
                                   Temp("client.pem"),
                                   "--key-file",
                                   Temp("client.key")};
  const Outcome no_token = Job(server, args);
  EXPECT_EQ(no_token.code, kExitUnavailable);
  EXPECT_THAT(no_token.err, HasSubstr("authorization: missing"));
  args.insert(args.end(), {"--token-file", Temp("token")});
  const Outcome served = Job(server, args);
  EXPECT_EQ(served.code, kExitOk) << served.err;

  const Outcome no_file = Job(server, {"list", "--ca-file", Temp("missing")});
  EXPECT_EQ(no_file.code, kExitBadInput);
  EXPECT_THAT(no_file.err, HasSubstr("ca_file: cannot read"));
}

}  // namespace
}  // namespace pipeweaver::ctl
