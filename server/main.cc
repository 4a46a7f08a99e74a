// The planner server: flags and config in, a running server out, drained on
// SIGTERM or SIGINT.
//
// Exit codes: 0 after a drain, or when --validate finds nothing wrong; 1 when
// it cannot start, when it has drained because it can accept no more
// connections, or when a flag is unknown or has a value of the wrong type; 2
// for a config that breaks a rule, or an argument that is not a flag.

#include <google/protobuf/text_format.h>
#include <grpc/support/log.h>
#include <pthread.h>
#include <signal.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "search/planner.h"
#include "semu/base/flags_help.h"
#include "semu/base/status_macros.h"
#include "semu/base/text_source.h"
#include "server/clock.h"
#include "server/config.h"
#include "server/plan_simulator.h"
#include "server/server.h"
#include "server/subgraph_costs.h"

ABSL_FLAG(std::string, config, "",
          "file with a pipeweaver.v1.ServerConfig in protobuf text");
ABSL_FLAG(bool, validate, false, "check the configuration, print it, and exit");

// One flag for each field of ServerConfig, which explains them.
#define PW_CONFIG_FIELDS(FIELD)             \
  FIELD(std::string, listen_address)        \
  FIELD(std::string, metrics_address)       \
  FIELD(int32_t, planner_threads)           \
  FIELD(int64_t, search_budget_ms)          \
  FIELD(int64_t, seal_margin_ms)            \
  FIELD(int32_t, max_steps_per_replica)     \
  FIELD(int32_t, max_jobs)                  \
  FIELD(int64_t, max_plan_bytes)            \
  FIELD(int64_t, plan_ttl_seconds)          \
  FIELD(int64_t, job_ttl_seconds)           \
  FIELD(int64_t, max_message_bytes)         \
  FIELD(bool, reflection)                   \
  FIELD(int64_t, drain_ms)                  \
  FIELD(int32_t, max_job_labels)            \
  FIELD(std::string, cert_file)             \
  FIELD(std::string, key_file)              \
  FIELD(std::string, client_ca_file)        \
  FIELD(std::string, token_file)            \
  FIELD(int32_t, max_queued)                \
  FIELD(int64_t, max_search_ms)             \
  FIELD(int32_t, keepalive_seconds)         \
  FIELD(int64_t, transport_memory_bytes)    \
  FIELD(int64_t, subgraph_store_bytes)      \
  FIELD(std::string, subgraph_store_file)   \
  FIELD(int64_t, subgraph_store_file_bytes) \
  FIELD(std::string, subgraph_store_redis)

#define PW_DEFINE_FLAG(type, name)                   \
  ABSL_FLAG(std::optional<type>, name, std::nullopt, \
            "overrides ServerConfig." #name);
PW_CONFIG_FIELDS(PW_DEFINE_FLAG)
#undef PW_DEFINE_FLAG

namespace pipeweaver::server {
namespace {

constexpr std::size_t kMaxConfigBytes = std::size_t{64} << 20;
// For what the subgraph store has to write at the end.
constexpr std::chrono::milliseconds kFlushTime{1000};

absl::StatusOr<v1::ServerConfig> ConfigFromFlags() {
  v1::ServerConfig config;
  if (const std::string path = absl::GetFlag(FLAGS_config); !path.empty()) {
    const absl::StatusOr<std::string> text =
        ReadTextFile(path, kMaxConfigBytes);
    if (!text.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("config: ", text.status().message()));
    }
    PW_ASSIGN_OR_RETURN(config, ParseConfig(*text, path));
  }
#define PW_OVERRIDE(type, name)                   \
  if (auto value = absl::GetFlag(FLAGS_##name)) { \
    config.set_##name(*std::move(value));         \
  }
  PW_CONFIG_FIELDS(PW_OVERRIDE)
#undef PW_OVERRIDE
  return CompleteConfig(std::move(config));
}

// Each connection takes a file descriptor: the hard limit is the only one.
void RaiseFileDescriptorLimit() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

std::atomic<bool> listener_ended = false;

// Takes what gRPC logs. gRPC's listener (1.51) ends with the first accept4 that
// fails, for want of file descriptors say, and says so in the log only: the
// server then drains.
void LogForGrpc(gpr_log_func_args* args) {
  spdlog::log(args->severity == GPR_LOG_SEVERITY_ERROR ? spdlog::level::err
                                                       : spdlog::level::info,
              "gRPC: {}", args->message);
  if (absl::StartsWith(args->message, "Failed accept4")) {
    listener_ended = true;
    kill(getpid(), SIGTERM);
  }
}

int Run() {
  const absl::StatusOr<v1::ServerConfig> config = ConfigFromFlags();
  if (!config.ok()) {
    spdlog::error("configuration: {}", config.status().ToString());
    return 2;
  }
  std::string text;
  google::protobuf::TextFormat::PrintToString(*config, &text);
  if (absl::GetFlag(FLAGS_validate)) {
    std::fputs(text.c_str(), stdout);
    return 0;
  }
  spdlog::info("configuration:\n{}", text);

  // Blocked before any thread starts, so that only sigwait below takes them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);

  RaiseFileDescriptorLimit();
  gpr_set_log_function(LogForGrpc);
  const absl::StatusOr<SubgraphCosts> costs = MakeSubgraphCosts(*config);
  if (!costs.ok()) {
    spdlog::error("{}", costs.status().ToString());
    return 1;
  }
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner(costs->costs);
  SteadyClock clock;
  auto server = Server::Start(*config, planner.get(), SimulatePlan, &clock,
                              {costs->metrics});
  if (!server.ok()) {
    spdlog::error("{}", server.status().ToString());
    return 1;
  }
  // Whatever GRPC_VERBOSITY, which gRPC has read by now, LogForGrpc must see
  // errors.
  if (!gpr_should_log(GPR_LOG_SEVERITY_ERROR)) {
    gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
  }
  std::printf("listening on %s, metrics on %s\n", (*server)->address().c_str(),
              (*server)->metrics_address().c_str());
  std::fflush(stdout);

  int signal = 0;
  sigwait(&signals, &signal);
  while (signal == SIGHUP) {
    spdlog::warn("SIGHUP: ignored, the configuration is read at start only");
    sigwait(&signals, &signal);
  }
  const int exit_code = listener_ended ? 1 : 0;
  if (exit_code != 0) {
    spdlog::error("no more connections can be accepted: ends with 1");
  } else {
    spdlog::info("signal {}", signal);
  }
  (*server)->Drain();
  if (!costs->Flush(kFlushTime)) {
    spdlog::warn("subgraph store: layer costs not written in time are lost");
  }
  // Not by way of destructors: the metrics listener's takes two seconds.
  // gRPC's threads may log to the end.
  spdlog::default_logger()->flush();
  std::fflush(stdout);
  std::_Exit(exit_code);
}

}  // namespace
}  // namespace pipeweaver::server

int main(int argc, char** argv) {
  // The reader of a log may end before the server does.
  signal(SIGPIPE, SIG_IGN);
  spdlog::set_default_logger(spdlog::stderr_logger_mt("pipeweaver"));
  pipeweaver::SetHelp(
      "plans training steps; proto/pipeweaver/v1/server_config.proto explains "
      "the configuration",
      "server/main.cc");
  const std::vector<char*> arguments = absl::ParseCommandLine(argc, argv);
  if (arguments.size() > 1) {
    spdlog::error("{}: not a flag; a configuration is given as --config=FILE",
                  arguments[1]);
    return 2;
  }
  return pipeweaver::server::Run();
}
