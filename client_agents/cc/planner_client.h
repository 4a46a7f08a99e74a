// The C++ client of the planner: what a trainer links. It needs the protocol
// alone, nothing of the planner.
//
//   PW_ASSIGN_OR_RETURN(PlannerClient client,
//                       PlannerClient::Create("planner:7411", {}));
//   ... client.RegisterJob(request), client.SubmitStep(request) ...
//   absl::StatusOr<v1::Program> program = client.GetProgram(key, rank);

#ifndef CLIENT_AGENTS_CC_PLANNER_CLIENT_H_
#define CLIENT_AGENTS_CC_PLANNER_CLIENT_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/planner_service.pb.h"

namespace pipeweaver::client {

struct PlannerClientOptions {
  // Each call ends by then, retries and all chunks of a program included.
  std::chrono::milliseconds call_timeout = std::chrono::seconds(10);
  // Of RegisterJob, where a layout is chosen, and of CompareStrategies, where
  // each may search for the server's max_search_ms: seconds, or longer on a
  // busy planner; never less than call_timeout.
  std::chrono::milliseconds search_timeout = std::chrono::minutes(2);
  // PEM file of the authority that signed the server's certificate; empty:
  // plaintext.
  std::string ca_file;
  // PEM files of the certificate that a server with client_ca_file asks for.
  std::string cert_file;
  std::string key_file;
  // Name to expect in the server's certificate; empty: that of the address.
  std::string tls_server_name;
  // File with the bearer token that the server asks for, read once.
  std::string token_file;
  // Most bytes of a program to ask for in one call; 0: the server's limit.
  uint32_t chunk_bytes = 0;
};

// One connection to a planner. Calls that may be repeated without harm (all but
// CancelStep, RemoveJob, UploadProfile and CompareStrategies) are tried up to
// five times, with backoff, while the server is UNAVAILABLE. Every error is the
// server's own status (see planner_service.proto), or
// - UNAVAILABLE, DEADLINE_EXCEEDED: the server cannot be reached in time,
// - DATA_LOSS: what came is not what its digests say.
// Thread-safe; calls block. Keep it: a fresh connection costs milliseconds.
class PlannerClient {
 public:
  // `address` is host:port or unix:path. Does not connect yet. Errors:
  // INVALID_ARGUMENT for an empty address or a file that cannot be read.
  static absl::StatusOr<PlannerClient> Create(
      const std::string& address, const PlannerClientOptions& options);

  PlannerClient(PlannerClient&&) noexcept;
  PlannerClient& operator=(PlannerClient&&) noexcept;
  ~PlannerClient();

  absl::StatusOr<v1::RegisterJobResponse> RegisterJob(
      const v1::RegisterJobRequest& request);
  absl::StatusOr<v1::ConfirmLayoutResponse> ConfirmLayout(
      const v1::ConfirmLayoutRequest& request);
  absl::StatusOr<v1::DescribeJobResponse> DescribeJob(
      const v1::DescribeJobRequest& request);
  absl::StatusOr<v1::ListJobsResponse> ListJobs(
      const v1::ListJobsRequest& request);
  absl::StatusOr<v1::RemoveJobResponse> RemoveJob(
      const v1::RemoveJobRequest& request);
  absl::StatusOr<v1::SubmitStepResponse> SubmitStep(
      const v1::SubmitStepRequest& request);
  absl::StatusOr<v1::CancelStepResponse> CancelStep(
      const v1::CancelStepRequest& request);
  absl::StatusOr<v1::ReportStepResponse> ReportStep(
      const v1::ReportStepRequest& request);
  absl::StatusOr<v1::UploadProfileResponse> UploadProfile(
      const v1::UploadProfileRequest& request);
  absl::StatusOr<v1::CompareStrategiesResponse> CompareStrategies(
      const v1::CompareStrategiesRequest& request);
  absl::StatusOr<v1::SimulatePlanResponse> SimulatePlan(
      const v1::SimulatePlanRequest& request);

  // The step's plan; waits until it is sealed.
  absl::StatusOr<v1::Plan> GetPlan(const v1::PlanKey& key);

  // One rank's program; waits until it is sealed, reads all chunks, and
  // verifies digests, key and rank.
  absl::StatusOr<v1::Program> GetProgram(const v1::PlanKey& key, uint32_t rank);

 private:
  struct Impl;
  explicit PlannerClient(std::unique_ptr<Impl> impl);

  std::unique_ptr<Impl> impl_;
};

}  // namespace pipeweaver::client

#endif  // CLIENT_AGENTS_CC_PLANNER_CLIENT_H_
