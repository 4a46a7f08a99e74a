#include "server/config.h"

#include <fstream>
#include <functional>
#include <iterator>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::server {
namespace {

using ::testing::HasSubstr;

std::string WriteFile(const std::string& name, const std::string& text) {
  const std::string path = ::testing::TempDir() + "/" + name;
  std::ofstream(path) << text;
  return path;
}

TEST(ConfigTest, FillsInEveryDefault) {
  const auto config = CompleteConfig({});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->listen_address(), "127.0.0.1:7411");
  EXPECT_EQ(config->metrics_address(), "127.0.0.1:7412");
  EXPECT_EQ(config->search_budget_ms(), 50);
  // What is complete stays as it is.
  EXPECT_EQ(CompleteConfig(*config)->ShortDebugString(),
            config->ShortDebugString());
  const PlannerCoreOptions options = CoreOptions(*config);
  EXPECT_EQ(options.search_budget, std::chrono::milliseconds(50));
  EXPECT_EQ(options.steps.plan_ttl, std::chrono::seconds(600));
  EXPECT_EQ(options.steps.max_plan_bytes, 1 << 30);
}

TEST(ConfigTest, ParsesTextAndNamesTheLineOfAnError) {
  const auto config = ParseConfig("planner_threads: 3 reflection: true", "f");
  ASSERT_TRUE(config.ok());
  EXPECT_EQ(config->planner_threads(), 3);
  const auto bad =
      ParseConfig("planner_threads: 3\nplaner: 1\n", "f.textproto");
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr("f.textproto:2:"));
}

TEST(ConfigTest, TheExampleConfigurationIsComplete) {
  std::ifstream in("deploy/server.textproto");
  ASSERT_TRUE(in) << "deploy/server.textproto is missing";
  const std::string text((std::istreambuf_iterator<char>(in)), {});
  const auto config = ParseConfig(text, "deploy/server.textproto");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(CompleteConfig(*config).ok());
}

TEST(ConfigTest, TakesAddressesOfEveryKind) {
  for (const char* address :
       {"planner-0.train_1.svc:80", "[::]:0", "[fe80::1%eth0]:7411",
        "0.0.0.0:65535", "unix:/run/planner.sock", "unix:planner.sock",
        "unix:///run/planner.sock"}) {
    v1::ServerConfig config;
    config.set_listen_address(address);
    EXPECT_TRUE(CompleteConfig(config).ok()) << address;
  }
}

struct BadConfig {
  const char* name;
  std::function<void(v1::ServerConfig*)> spoil;
  const char* message;
};

class BadConfigTest : public ::testing::TestWithParam<BadConfig> {};

TEST_P(BadConfigTest, IsRefused) {
  v1::ServerConfig config;
  GetParam().spoil(&config);
  const auto complete = CompleteConfig(config);
  ASSERT_EQ(complete.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(complete.status().message()),
              HasSubstr(GetParam().message));
}

INSTANTIATE_TEST_SUITE_P(
    Rules, BadConfigTest,
    ::testing::Values(
        BadConfig{"Address",
                  [](v1::ServerConfig* c) { c->set_listen_address("here"); },
                  "listen_address: 'here', must be host:port or unix:path"},
        BadConfig{"Port",
                  [](v1::ServerConfig* c) {
                    c->set_metrics_address("127.0.0.1:65536");
                  },
                  "metrics_address: '127.0.0.1:65536'"},
        BadConfig{"Ipv6WithoutBrackets",
                  [](v1::ServerConfig* c) { c->set_listen_address("::1:80"); },
                  "listen_address: '::1:80', must be host:port or unix:path; "
                  "an IPv6 host stands in brackets"},
        BadConfig{"OpenBracket",
                  [](v1::ServerConfig* c) { c->set_listen_address("[::1:80"); },
                  "listen_address: '[::1:80'"},
        BadConfig{"Space",
                  [](v1::ServerConfig* c) { c->set_listen_address(" a:80"); },
                  "listen_address: ' a:80'"},
        BadConfig{"EscapeInAUnixPath",
                  [](v1::ServerConfig* c) {
                    c->set_listen_address("unix:/run/a%20b.sock");
                  },
                  "listen_address: 'unix:/run/a%20b.sock', must have no % in "
                  "its path"},
        BadConfig{"UnixPathWithAnAuthority",
                  [](v1::ServerConfig* c) {
                    c->set_listen_address("unix://run/planner.sock");
                  },
                  "listen_address: 'unix://run/planner.sock', must have a path "
                  "from / after unix://"},
        BadConfig{"TwiceTheSame",
                  [](v1::ServerConfig* c) {
                    c->set_metrics_address("127.0.0.1:7411");
                  },
                  "metrics_address: '127.0.0.1:7411', must not be "
                  "listen_address"},
        BadConfig{
            "MetricsOverIpv6",
            [](v1::ServerConfig* c) { c->set_metrics_address("[::1]:80"); },
            "must be host:port or none; IPv6 is not served"},
        BadConfig{"MetricsOverUnix",
                  [](v1::ServerConfig* c) { c->set_metrics_address("unix:a"); },
                  "must be host:port or none"},
        BadConfig{"Threads",
                  [](v1::ServerConfig* c) { c->set_planner_threads(-1); },
                  "planner_threads: -1, must be 1 .. 1024"},
        BadConfig{"Bytes",
                  [](v1::ServerConfig* c) { c->set_max_plan_bytes(1); },
                  "max_plan_bytes: 1"},
        BadConfig{"StoreBytes",
                  [](v1::ServerConfig* c) { c->set_subgraph_store_bytes(1); },
                  "subgraph_store_bytes: 1, must be 1048576 .."},
        BadConfig{
            "StoreFileBytes",
            [](v1::ServerConfig* c) { c->set_subgraph_store_file_bytes(-1); },
            "subgraph_store_file_bytes: -1, must be 16777216 .."},
        BadConfig{"StoreFileWithoutAFolder",
                  [](v1::ServerConfig* c) {
                    c->set_subgraph_store_file("/no-such-folder/store");
                  },
                  "subgraph_store_file: '/no-such-folder/store': its folder "
                  "does not exist"},
        BadConfig{"StoreFileThatIsAFolder",
                  [](v1::ServerConfig* c) { c->set_subgraph_store_file("/"); },
                  "subgraph_store_file: '/': is not a regular file"},
        BadConfig{
            "Redis",
            [](v1::ServerConfig* c) { c->set_subgraph_store_redis("redis"); },
            "subgraph_store_redis: 'redis', must be host:port or unix:"},
        BadConfig{"KeyWithoutCertificate",
                  [](v1::ServerConfig* c) { c->set_key_file("k"); },
                  "must be set both or neither"},
        BadConfig{"ClientCaWithoutTls",
                  [](v1::ServerConfig* c) { c->set_client_ca_file("ca"); },
                  "client_ca_file: 'ca', needs cert_file"},
        BadConfig{"MissingCertificate",
                  [](v1::ServerConfig* c) {
                    c->set_cert_file("/nonexistent/c");
                    c->set_key_file("/nonexistent/k");
                  },
                  "cert_file: cannot read"},
        BadConfig{"MissingProfile",
                  [](v1::ServerConfig* c) {
                    c->add_profiles()->set_job("vlm");
                    c->mutable_profiles(0)->set_file("/nonexistent/p");
                  },
                  "profiles[0].file: /nonexistent/p"},
        BadConfig{"BadProfile",
                  [](v1::ServerConfig* c) {
                    c->add_profiles()->set_job("vlm");
                    c->mutable_profiles(0)->set_file(
                        WriteFile("bad.profile", "format_version: 2"));
                  },
                  "format_version: 2, must be 1"},
        BadConfig{"ProfileWithoutJob",
                  [](v1::ServerConfig* c) {
                    c->add_profiles()->set_file(WriteFile(
                        "good.profile", "format_version: 1 version: 1"));
                  },
                  "profiles[0].job"},
        BadConfig{"NotPem",
                  [](v1::ServerConfig* c) {
                    c->set_cert_file(WriteFile("not.pem", "text"));
                    c->set_key_file(c->cert_file());
                  },
                  "is not a PEM file"},
        BadConfig{"ShortToken",
                  [](v1::ServerConfig* c) {
                    c->set_token_file(WriteFile("token", "secret\n"));
                  },
                  "token_file"}),
    [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace pipeweaver::server
