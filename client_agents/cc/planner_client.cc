// See planner_client.h.

#include "client_agents/cc/planner_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <fstream>
#include <memory>
#include <sstream>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "google/protobuf/util/message_differencer.h"
#include "pipeweaver/v1/planner_service.grpc.pb.h"
#include "proto/digest/digest.h"

namespace pipeweaver::client {
namespace {

// Retries of UNAVAILABLE for the calls that may be repeated, and none for the
// rest; reconnects do not wait for longer than a trainer's step.
constexpr char kServiceConfig[] = R"json({
  "methodConfig": [{
    "name": [
      {"service": "pipeweaver.v1.PlannerService", "method": "RegisterJob"},
      {"service": "pipeweaver.v1.PlannerService", "method": "ConfirmLayout"},
      {"service": "pipeweaver.v1.PlannerService", "method": "DescribeJob"},
      {"service": "pipeweaver.v1.PlannerService", "method": "ListJobs"},
      {"service": "pipeweaver.v1.PlannerService", "method": "SubmitStep"},
      {"service": "pipeweaver.v1.PlannerService", "method": "GetPlan"},
      {"service": "pipeweaver.v1.PlannerService", "method": "GetProgram"},
      {"service": "pipeweaver.v1.PlannerService", "method": "ReportStep"},
      {"service": "pipeweaver.v1.PlannerService", "method": "SimulatePlan"}
    ],
    "retryPolicy": {
      "maxAttempts": 5,
      "initialBackoff": "0.05s",
      "maxBackoff": "1s",
      "backoffMultiplier": 2,
      "retryableStatusCodes": ["UNAVAILABLE"]
    }
  }],
  "retryThrottling": {"maxTokens": 10, "tokenRatio": 0.1}
})json";

// A chunk and its envelope; the server sends no more than 1 MiB of data.
constexpr int kMaxReceiveBytes = 64 << 20;
// No program is larger; a server that says so is not to be believed.
constexpr uint64_t kMaxProgramBytes = uint64_t{1} << 30;

absl::StatusOr<std::string> ReadFile(absl::string_view option,
                                     const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  if (!in) {
    return absl::InvalidArgumentError(
        absl::StrCat(option, ": cannot read '", path, "'"));
  }
  if (text.view().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(
        option, ": '", path, "' must be a file that is not empty"));
  }
  return text.str();
}

absl::Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  if (status.error_code() == grpc::StatusCode::CANCELLED) {
    // This client cancels nothing: a server that goes away does.
    return absl::UnavailableError("the server cancelled the call");
  }
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                      status.error_message());
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeCredentials(
    const PlannerClientOptions& options) {
  if (options.ca_file.empty()) {
    if (!options.cert_file.empty() || !options.key_file.empty()) {
      return absl::InvalidArgumentError(
          "cert_file, key_file: set without ca_file");
    }
    return grpc::InsecureChannelCredentials();
  }
  grpc::SslCredentialsOptions ssl;
  const std::pair<const char*, std::pair<const std::string*, std::string*>>
      files[] = {{"ca_file", {&options.ca_file, &ssl.pem_root_certs}},
                 {"cert_file", {&options.cert_file, &ssl.pem_cert_chain}},
                 {"key_file", {&options.key_file, &ssl.pem_private_key}}};
  for (const auto& [option, file] : files) {
    if (file.first->empty()) continue;
    absl::StatusOr<std::string> text = ReadFile(option, *file.first);
    if (!text.ok()) return text.status();
    *file.second = *std::move(text);
  }
  return grpc::SslCredentials(ssl);
}

// gRPC looks after a connection that it is making only while somebody polls:
// during calls, else every five seconds. This polls as long as it lives, so
// that a server that comes back is found at once.
class ConnectionWatcher {
 public:
  explicit ConnectionWatcher(std::shared_ptr<grpc::Channel> channel)
      : thread_([this, channel = std::move(channel)] {
          while (!stopped_) {
            channel->WaitForStateChange(
                channel->GetState(false),
                std::chrono::system_clock::now() + kTick);
          }
        }) {}
  ~ConnectionWatcher() {
    stopped_ = true;
    thread_.join();
  }

 private:
  // What the end of a client may take longer for it.
  static constexpr std::chrono::milliseconds kTick{50};

  std::atomic<bool> stopped_ = false;
  std::thread thread_;
};

}  // namespace

struct PlannerClient::Impl {
  PlannerClientOptions options;
  std::string authorization;  // empty: none
  std::unique_ptr<v1::PlannerService::Stub> stub;
  std::unique_ptr<ConnectionWatcher> watcher;

  std::chrono::system_clock::time_point Deadline() const {
    return std::chrono::system_clock::now() + options.call_timeout;
  }
  std::chrono::system_clock::time_point SearchDeadline() const {
    return std::chrono::system_clock::now() +
           std::max(options.call_timeout, options.search_timeout);
  }

  template <typename Request, typename Response>
  absl::StatusOr<Response> Call(
      grpc::Status (v1::PlannerService::Stub::*method)(grpc::ClientContext*,
                                                       const Request&,
                                                       Response*),
      const Request& request, std::chrono::system_clock::time_point deadline) {
    grpc::ClientContext context;
    context.set_deadline(deadline);
    if (!authorization.empty()) {
      context.AddMetadata("authorization", authorization);
    }
    Response response;
    const absl::Status status =
        FromGrpc((stub.get()->*method)(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
};

PlannerClient::PlannerClient(std::unique_ptr<Impl> impl)
    : impl_(std::move(impl)) {}
PlannerClient::PlannerClient(PlannerClient&&) noexcept = default;
PlannerClient& PlannerClient::operator=(PlannerClient&&) noexcept = default;
PlannerClient::~PlannerClient() = default;

absl::StatusOr<PlannerClient> PlannerClient::Create(
    const std::string& address, const PlannerClientOptions& options) {
  if (address.empty()) {
    return absl::InvalidArgumentError(
        "address: '', must be host:port or unix:path");
  }
  auto impl = std::make_unique<Impl>();
  impl->options = options;
  if (!options.token_file.empty()) {
    absl::StatusOr<std::string> token =
        ReadFile("token_file", options.token_file);
    if (!token.ok()) return token.status();
    impl->authorization =
        absl::StrCat("Bearer ", absl::StripAsciiWhitespace(*token));
  }
  auto credentials = MakeCredentials(options);
  if (!credentials.ok()) return credentials.status();
  grpc::ChannelArguments arguments;
  arguments.SetServiceConfigJSON(kServiceConfig);
  arguments.SetMaxReceiveMessageSize(kMaxReceiveBytes);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // Its name notwithstanding, how long a connection may take to be made.
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5000);
  // A connection that died without a word is given up. The server wants 20 s at
  // least between probes.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A connection of its own, not one shared within the process.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  if (!options.tls_server_name.empty()) {
    arguments.SetSslTargetNameOverride(options.tls_server_name);
  }
  const std::shared_ptr<grpc::Channel> channel =
      grpc::CreateCustomChannel(address, *credentials, arguments);
  impl->stub = v1::PlannerService::NewStub(channel);
  impl->watcher = std::make_unique<ConnectionWatcher>(channel);
  return PlannerClient(std::move(impl));
}

absl::StatusOr<v1::RegisterJobResponse> PlannerClient::RegisterJob(
    const v1::RegisterJobRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::RegisterJob, request,
                     impl_->SearchDeadline());
}

absl::StatusOr<v1::ConfirmLayoutResponse> PlannerClient::ConfirmLayout(
    const v1::ConfirmLayoutRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::ConfirmLayout, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::DescribeJobResponse> PlannerClient::DescribeJob(
    const v1::DescribeJobRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::DescribeJob, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::ListJobsResponse> PlannerClient::ListJobs(
    const v1::ListJobsRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::ListJobs, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::RemoveJobResponse> PlannerClient::RemoveJob(
    const v1::RemoveJobRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::RemoveJob, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::SubmitStepResponse> PlannerClient::SubmitStep(
    const v1::SubmitStepRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::SubmitStep, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::CancelStepResponse> PlannerClient::CancelStep(
    const v1::CancelStepRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::CancelStep, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::ReportStepResponse> PlannerClient::ReportStep(
    const v1::ReportStepRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::ReportStep, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::UploadProfileResponse> PlannerClient::UploadProfile(
    const v1::UploadProfileRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::UploadProfile, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::CompareStrategiesResponse> PlannerClient::CompareStrategies(
    const v1::CompareStrategiesRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::CompareStrategies, request,
                     impl_->SearchDeadline());
}

absl::StatusOr<v1::SimulatePlanResponse> PlannerClient::SimulatePlan(
    const v1::SimulatePlanRequest& request) {
  return impl_->Call(&v1::PlannerService::Stub::SimulatePlan, request,
                     impl_->Deadline());
}

absl::StatusOr<v1::Plan> PlannerClient::GetPlan(const v1::PlanKey& key) {
  v1::GetPlanRequest request;
  *request.mutable_key() = key;
  absl::StatusOr<v1::GetPlanResponse> response = impl_->Call(
      &v1::PlannerService::Stub::GetPlan, request, impl_->Deadline());
  if (!response.ok()) return response.status();
  return std::move(*response->mutable_plan());
}

absl::StatusOr<v1::Program> PlannerClient::GetProgram(const v1::PlanKey& key,
                                                      uint32_t rank) {
  const auto deadline = impl_->Deadline();
  v1::GetProgramRequest request;
  *request.mutable_key() = key;
  request.set_rank(rank);
  request.set_max_bytes(impl_->options.chunk_bytes);
  std::string bytes;
  while (true) {
    request.set_offset(bytes.size());
    absl::StatusOr<v1::GetProgramResponse> chunk =
        impl_->Call(&v1::PlannerService::Stub::GetProgram, request, deadline);
    if (!chunk.ok()) return chunk.status();
    const uint64_t total = chunk->total_bytes();
    if (total > kMaxProgramBytes || total < bytes.size() ||
        chunk->data().empty() || chunk->data().size() > total - bytes.size()) {
      return absl::DataLossError(
          absl::StrCat("data: ", chunk->data().size(), " bytes at offset ",
                       bytes.size(), " of a program of ", total, " bytes"));
    }
    if (chunk->data().size() == total) {
      bytes = std::move(*chunk->mutable_data());
    } else {
      bytes.reserve(total);
      bytes += chunk->data();
    }
    if (bytes.size() == total) break;
  }
  v1::Program program;
  if (!program.ParseFromString(bytes)) {
    return absl::DataLossError(
        absl::StrCat("data: ", bytes.size(), " bytes are not a Program"));
  }
  if (program.rank() != rank) {
    return absl::DataLossError(absl::StrCat("rank: the program is for rank ",
                                            program.rank(), ", not ", rank));
  }
  if (!google::protobuf::util::MessageDifferencer::Equals(
          program.identity().key(), key)) {
    return absl::DataLossError(
        absl::StrCat("identity.key: the program is for ",
                     program.identity().key().ShortDebugString(), ", not ",
                     key.ShortDebugString()));
  }
  if (absl::Status status = VerifyProgramDigests(program); !status.ok()) {
    return status;
  }
  return program;
}

}  // namespace pipeweaver::client
