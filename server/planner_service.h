// PlannerService's handlers: each turns its request into values, asks the core,
// and turns the answer into its response. No state of their own.
//
// They use gRPC's callback API. The sync API gives more short calls a second
// (28,600 against 21,200 at 8 at once on two cores, equal at 64), but holds a
// thread for each read that waits for its plan, and that is every rank of every
// job, steps ahead. GetProgram is a raw method: the sealed bytes go out by
// reference, never copied or serialised again.

#ifndef SERVER_PLANNER_SERVICE_H_
#define SERVER_PLANNER_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/planner_service.grpc.pb.h"
#include "server/auth.h"
#include "server/metrics.h"
#include "server/planner_core.h"

namespace pipeweaver::server {

// A plan's programs timed under other conditions.
struct Simulation {
  double latency_factor = 1;
  double bandwidth_factor = 1;
  double duration_noise = 0;
  int runs = 1;
  uint64_t seed = 0;
};

// Makespan of each run, nanoseconds; run i draws its noise from seed + i.
// Errors: CANCELLED when `cancelled` was set.
using SimulateFunction = std::function<absl::StatusOr<std::vector<int64_t>>(
    const search::PlannableJob& job, const search::StepPlan& plan,
    const Simulation& simulation, const std::atomic<bool>& cancelled)>;

// Thread-safe.
class PlannerServiceImpl final
    : public v1::PlannerService::WithRawCallbackMethod_GetProgram<
          v1::PlannerService::CallbackService> {
 public:
  // What is passed by pointer must outlive the service.
  PlannerServiceImpl(PlannerCore* core, Metrics* metrics, const TokenAuth* auth,
                     SimulateFunction simulate);

  grpc::ServerUnaryReactor* RegisterJob(
      grpc::CallbackServerContext* context,
      const v1::RegisterJobRequest* request,
      v1::RegisterJobResponse* response) override;
  grpc::ServerUnaryReactor* ConfirmLayout(
      grpc::CallbackServerContext* context,
      const v1::ConfirmLayoutRequest* request,
      v1::ConfirmLayoutResponse* response) override;
  grpc::ServerUnaryReactor* DescribeJob(
      grpc::CallbackServerContext* context,
      const v1::DescribeJobRequest* request,
      v1::DescribeJobResponse* response) override;
  grpc::ServerUnaryReactor* ListJobs(grpc::CallbackServerContext* context,
                                     const v1::ListJobsRequest* request,
                                     v1::ListJobsResponse* response) override;
  grpc::ServerUnaryReactor* RemoveJob(grpc::CallbackServerContext* context,
                                      const v1::RemoveJobRequest* request,
                                      v1::RemoveJobResponse* response) override;
  grpc::ServerUnaryReactor* SubmitStep(
      grpc::CallbackServerContext* context,
      const v1::SubmitStepRequest* request,
      v1::SubmitStepResponse* response) override;
  grpc::ServerUnaryReactor* CancelStep(
      grpc::CallbackServerContext* context,
      const v1::CancelStepRequest* request,
      v1::CancelStepResponse* response) override;
  grpc::ServerUnaryReactor* GetPlan(grpc::CallbackServerContext* context,
                                    const v1::GetPlanRequest* request,
                                    v1::GetPlanResponse* response) override;
  grpc::ServerUnaryReactor* GetProgram(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ReportStep(
      grpc::CallbackServerContext* context,
      const v1::ReportStepRequest* request,
      v1::ReportStepResponse* response) override;
  grpc::ServerUnaryReactor* CompareStrategies(
      grpc::CallbackServerContext* context,
      const v1::CompareStrategiesRequest* request,
      v1::CompareStrategiesResponse* response) override;
  grpc::ServerUnaryReactor* SimulatePlan(
      grpc::CallbackServerContext* context,
      const v1::SimulatePlanRequest* request,
      v1::SimulatePlanResponse* response) override;

 private:
  class Call;

  absl::Status Admit(const grpc::CallbackServerContext& context) const;
  absl::StatusOr<Registration> ReadRegistration(
      const v1::RegisterJobRequest& request) const;
  absl::Status Describe(const v1::DescribeJobRequest& request,
                        v1::DescribeJobResponse* response) const;
  absl::Status Submit(const grpc::CallbackServerContext& context,
                      const v1::SubmitStepRequest& request,
                      v1::SubmitStepResponse* response);
  absl::Status Report(const v1::ReportStepRequest& request);
  // Starts a read of the step, which ends `call` by `done`.
  void Read(
      Call* call, const v1::PlanKey& key,
      std::function<absl::Status(const std::shared_ptr<const SealedPlan>&)>
          done);

  PlannerCore* const core_;
  Metrics* const metrics_;
  const TokenAuth* const auth_;
  const SimulateFunction simulate_;
};

}  // namespace pipeweaver::server

#endif  // SERVER_PLANNER_SERVICE_H_
