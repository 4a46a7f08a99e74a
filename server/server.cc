// See server.h.

#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <prometheus/exposer.h>
#include <spdlog/spdlog.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "semu/base/status_macros.h"
#include "semu/cost/measured/profile_layers.h"
#include "server/auth.h"
#include "server/config.h"
#include "server/metrics.h"
#include "server/planner_core.h"
#include "server/program_codec.h"

namespace pipeweaver::server {
namespace {

constexpr unsigned kCertificateRefreshSeconds = 10;
constexpr int kKeepaliveTimeoutMs = 20'000;
// At once, of a connection. A client has a few for each rank that it serves.
constexpr int kMaxCallsOfConnection = 4096;
constexpr auto kDrainPoll = std::chrono::milliseconds(2);
// For refusals on their way once no call is in flight. What else is open then
// are health watches, which end with their clients only.
constexpr auto kLastAnswers = std::chrono::milliseconds(100);

// A connection to the metrics page that asks for nothing holds a thread until
// the time is up: some are left for those that ask.
constexpr char kMetricsThreads[] = "4";
constexpr char kMetricsTimeoutMs[] = "2000";

std::shared_ptr<grpc::ServerCredentials> MakeCredentials(
    const v1::ServerConfig& config) {
  if (config.cert_file().empty()) return grpc::InsecureServerCredentials();
  using grpc::experimental::FileWatcherCertificateProvider;
  const bool mutual = !config.client_ca_file().empty();
  auto files = mutual ? std::make_shared<FileWatcherCertificateProvider>(
                            config.key_file(), config.cert_file(),
                            config.client_ca_file(), kCertificateRefreshSeconds)
                      : std::make_shared<FileWatcherCertificateProvider>(
                            config.key_file(), config.cert_file(),
                            kCertificateRefreshSeconds);
  grpc::experimental::TlsServerCredentialsOptions options(files);
  options.watch_identity_key_cert_pairs();
  if (mutual) {
    options.watch_root_certs();
    options.set_cert_request_type(
        GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return grpc::experimental::TlsServerCredentials(options);
}

// Takes server reflection out, which gRPC's library adds to every server of a
// program that it is linked into.
class WithoutReflection final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>*
                         plugins) override {
    plugins->erase(std::remove_if(plugins->begin(), plugins->end(),
                                  [](const auto& plugin) {
                                    return plugin->name() ==
                                           "proto_server_reflection";
                                  }),
                   plugins->end());
  }
};

// `address` with its port replaced by the one that was bound.
std::string BoundAddress(const std::string& address, int port) {
  if (absl::StartsWith(address, "unix:")) return address;
  return absl::StrCat(address.substr(0, address.rfind(':')), ":", port);
}

// A server binds to a unix socket's path even where another one serves on it,
// and takes its file away when it ends.
absl::Status CheckNoServerOn(const std::string& address) {
  absl::string_view path = address;
  if (!absl::ConsumePrefix(&path, "unix:")) return absl::OkStatus();
  absl::ConsumePrefix(&path, "//");
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  if (path.size() >= sizeof(name.sun_path)) return absl::OkStatus();
  path.copy(name.sun_path, path.size());
  const int socket_fd =
      socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (socket_fd < 0) return absl::OkStatus();
  const bool listens =
      connect(socket_fd, reinterpret_cast<const sockaddr*>(&name),
              sizeof(name)) == 0 ||
      errno == EAGAIN;  // as many as it lets wait do
  close(socket_fd);
  if (!listens) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("listen_address: cannot bind '", address,
                   "': another server listens on it"));
}

}  // namespace

struct Server::Parts {
  Parts(const v1::ServerConfig& server_config,
        const PlannerCoreOptions& options, const search::StepPlanner* planner,
        SimulateFunction simulate, Clock* clock, TokenAuth token_auth)
      : config(server_config),
        auth(std::move(token_auth)),
        metrics(std::make_shared<Metrics>(config.max_job_labels())),
        core(options, planner, &codec, clock, metrics.get()),
        service(&core, metrics.get(), &auth, std::move(simulate)) {
    metrics->SetSources(
        [this] {
          const PlanningPool::Load load = core.load();
          const StepTable::Held held = core.held();
          const PlanningPool::Load registrations = core.registrations();
          const PlanningPool::Load questions = core.questions();
          Metrics::Levels levels;
          levels.jobs = core.registry().size();
          levels.queue_length = load.queued;
          levels.searches_running = load.running;
          levels.steps_held = held.steps;
          levels.plan_bytes = held.plan_bytes;
          levels.registrations_waiting = registrations.queued;
          levels.registrations_running = registrations.running;
          levels.questions_waiting = questions.queued;
          levels.questions_running = questions.running;
          return levels;
        },
        [this](const std::string& job) { return core.HeldSteps(job); });
  }

  const v1::ServerConfig config;
  const TokenAuth auth;
  const std::shared_ptr<Metrics> metrics;
  // Held for the exposer, which does not.
  std::vector<std::shared_ptr<prometheus::Collectable>> more_metrics;
  const ProgramCodec codec;
  PlannerCore core;
  PlannerServiceImpl service;
  std::unique_ptr<prometheus::Exposer> exposer;
  std::unique_ptr<grpc::Server> grpc_server;
  std::string address;
  std::string metrics_address = "none";
  bool drained = false;
};

Server::Server(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

Server::~Server() { Drain(); }

const std::string& Server::address() const { return parts_->address; }
const std::string& Server::metrics_address() const {
  return parts_->metrics_address;
}

int Server::calls_in_flight() const {
  return parts_->metrics->rpcs_in_flight();
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(
    const v1::ServerConfig& config, const search::StepPlanner* planner,
    SimulateFunction simulate, Clock* clock,
    std::vector<std::shared_ptr<prometheus::Collectable>> more_metrics) {
  TokenAuth auth;
  if (!config.token_file().empty()) {
    PW_ASSIGN_OR_RETURN(auth, TokenAuth::FromFile(config.token_file()));
  }
  PlannerCoreOptions options = CoreOptions(config);
  PW_ASSIGN_OR_RETURN(std::vector<LoadedProfile> profiles,
                      LoadProfiles(config));
  options.measured_layers = [profiles =
                                 std::move(profiles)](const semu::Job& job) {
    std::vector<semu::MeasuredLayer> layers;
    for (const LoadedProfile& loaded : profiles) {
      if (loaded.job != job.name) continue;
      for (const semu::MeasuredLayer& layer :
           semu::MeasuredLayersOf(loaded.profile, job)) {
        layers.push_back(layer);
      }
    }
    return layers;
  };
  std::unique_ptr<Parts> parts;
  // Threads that cannot be started are reported by exceptions: they end here.
  try {
    parts = std::make_unique<Parts>(
        config, options, planner, std::move(simulate), clock, std::move(auth));
  } catch (const std::system_error& error) {
    return absl::ResourceExhaustedError(
        absl::StrCat("planner_threads: ", config.planner_threads(),
                     ", cannot start as many: ", error.what()));
  }

  if (config.metrics_address() != "none") {
    // prometheus-cpp reports errors by exceptions: they end here.
    try {
      parts->exposer =
          std::make_unique<prometheus::Exposer>(std::vector<std::string>{
              "listening_ports", config.metrics_address(), "num_threads",
              kMetricsThreads, "request_timeout_ms", kMetricsTimeoutMs});
    } catch (const std::exception& error) {
      return absl::UnavailableError(
          absl::StrCat("metrics_address: cannot bind '",
                       config.metrics_address(), "': ", error.what()));
    }
    parts->exposer->RegisterCollectable(parts->metrics);
    for (const auto& metrics : more_metrics) {
      parts->exposer->RegisterCollectable(metrics);
    }
    parts->more_metrics = std::move(more_metrics);
    const std::vector<int> ports = parts->exposer->GetListeningPorts();
    parts->metrics_address = BoundAddress(config.metrics_address(),
                                          ports.empty() ? 0 : ports.front());
  }

  // Off for the whole process: Debian's Abseil looks for locks taken in
  // circles, under a lock of its own at each lock of gRPC's.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  grpc::EnableDefaultHealthCheckService(true);
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  if (!config.reflection()) {
    builder.SetOption(std::make_unique<WithoutReflection>());
  }
  PW_RETURN_IF_ERROR(CheckNoServerOn(config.listen_address()));
  int port = 0;
  builder.AddListeningPort(config.listen_address(), MakeCredentials(config),
                           &port);
  builder.RegisterService(&parts->service);
  builder.SetMaxReceiveMessageSize(
      static_cast<int>(config.max_message_bytes()));
  // Two servers on one port would share its calls at random.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS,
                             config.keepalive_seconds() * 1000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                             kKeepaliveTimeoutMs);
  builder.AddChannelArgument(
      GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
      kKeepaliveTimeoutMs);
  // By default only connections with calls are probed, and twice in a row.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS,
                             kMaxCallsOfConnection);
  grpc::ResourceQuota quota("pipeweaver_server");
  quota.Resize(static_cast<size_t>(config.transport_memory_bytes()));
  builder.SetResourceQuota(quota);
  parts->grpc_server = builder.BuildAndStart();
  if (parts->grpc_server == nullptr) {
    return absl::UnavailableError(absl::StrCat("listen_address: cannot bind '",
                                               config.listen_address(), "'"));
  }
  parts->address = BoundAddress(config.listen_address(), port);
  return std::unique_ptr<Server>(new Server(std::move(parts)));
}

void Server::Drain() {
  if (parts_->grpc_server == nullptr || parts_->drained) return;
  parts_->drained = true;
  spdlog::info("draining for at most {} ms", parts_->config.drain_ms());
  if (auto* health = parts_->grpc_server->GetHealthCheckService()) {
    health->SetServingStatus(false);
  }
  // gRPC's own shutdown answers what still comes with CANCELLED; so refuse with
  // the right code for as long as calls are in flight.
  parts_->service.RefuseCalls();
  const auto deadline = std::chrono::system_clock::now() +
                        std::chrono::milliseconds(parts_->config.drain_ms());
  parts_->core.EndRegistrations();
  parts_->core.EndJointWaits();
  while (calls_in_flight() > 0 && std::chrono::system_clock::now() < deadline) {
    std::this_thread::sleep_for(kDrainPoll);
  }
  // What still runs ends its calls.
  parts_->core.BeginStop();
  parts_->grpc_server->Shutdown(std::chrono::system_clock::now() +
                                kLastAnswers);
  parts_->grpc_server->Wait();
  parts_->core.Stop();
  parts_->metrics->SetSources(nullptr, nullptr);
  spdlog::info("drained");
}

}  // namespace pipeweaver::server
