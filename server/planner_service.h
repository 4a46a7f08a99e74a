// PlannerService's handlers: each turns its request into values, asks the core,
// and turns the answer into its response. No state of their own.
//
// They use gRPC's callback API. The sync API gives more short calls a second
// (28,600 against 21,200 at 8 at once on two cores, equal at 64), but holds a
// thread for each read that waits for its plan, and that is every rank of every
// job, steps ahead. All methods are raw, that is bytes in and bytes out: a
// sealed program goes out by reference, never copied or serialised again, and
// bytes that are no message get the right code (the library of 1.51 says
// UNIMPLEMENTED).

#ifndef SERVER_PLANNER_SERVICE_H_
#define SERVER_PLANNER_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <atomic>
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

using RawPlannerService = v1::PlannerService::WithRawCallbackMethod_RegisterJob<
    v1::PlannerService::WithRawCallbackMethod_ConfirmLayout<
        v1::PlannerService::WithRawCallbackMethod_DescribeJob<
            v1::PlannerService::WithRawCallbackMethod_ListJobs<
                v1::PlannerService::WithRawCallbackMethod_RemoveJob<
                    v1::PlannerService::WithRawCallbackMethod_SubmitStep<
                        v1::PlannerService::WithRawCallbackMethod_CancelStep<
                            v1::PlannerService::WithRawCallbackMethod_GetPlan<
                                v1::PlannerService::WithRawCallbackMethod_GetProgram<
                                    v1::PlannerService::
                                        WithRawCallbackMethod_ReportStep<
                                            v1::PlannerService::WithRawCallbackMethod_CompareStrategies<
                                                v1::PlannerService::
                                                    WithRawCallbackMethod_SimulatePlan<
                                                        v1::PlannerService::WithRawCallbackMethod_UploadProfile<
                                                            v1::PlannerService::
                                                                Service>>>>>>>>>>>>>;

// Thread-safe.
class PlannerServiceImpl final : public RawPlannerService {
 public:
  // What is passed by pointer must outlive the service.
  PlannerServiceImpl(PlannerCore* core, Metrics* metrics, const TokenAuth* auth,
                     SimulateFunction simulate);

  // Later calls get UNAVAILABLE; those in flight go on.
  void RefuseCalls() { refuses_ = true; }

  grpc::ServerUnaryReactor* RegisterJob(grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ConfirmLayout(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* DescribeJob(grpc::CallbackServerContext* context,
                                        const grpc::ByteBuffer* request,
                                        grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ListJobs(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* RemoveJob(grpc::CallbackServerContext* context,
                                      const grpc::ByteBuffer* request,
                                      grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* SubmitStep(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* CancelStep(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetPlan(grpc::CallbackServerContext* context,
                                    const grpc::ByteBuffer* request,
                                    grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetProgram(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ReportStep(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* CompareStrategies(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
      grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* SimulatePlan(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* UploadProfile(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer* request,
                                          grpc::ByteBuffer* response) override;

 private:
  class Call;
  template <typename Request, typename Response>
  class MessageCall;

  absl::Status Admit(const grpc::CallbackServerContext& context) const;
  // Starts a call: lets it in, parses its request, and passes it to `handle`,
  // which ends it, then or later.
  template <typename Request, typename Response, typename Handle>
  grpc::ServerUnaryReactor* Start(RpcMethod method,
                                  grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request,
                                  grpc::ByteBuffer* response, Handle handle);
  // As Start, for a handler that returns the status to end the call with.
  template <typename Request, typename Response, typename Handle>
  grpc::ServerUnaryReactor* Answer(RpcMethod method,
                                   grpc::CallbackServerContext* context,
                                   const grpc::ByteBuffer* request,
                                   grpc::ByteBuffer* response, Handle handle);

  absl::Status Describe(const v1::DescribeJobRequest& request,
                        v1::DescribeJobResponse* response) const;
  absl::Status Submit(const grpc::CallbackServerContext& context,
                      const v1::SubmitStepRequest& request,
                      v1::SubmitStepResponse* response);
  absl::Status Report(const v1::ReportStepRequest& request);
  absl::Status Upload(const v1::UploadProfileRequest& request,
                      v1::UploadProfileResponse* response);
  absl::Status StartCompare(const grpc::CallbackServerContext& context,
                            MessageCall<v1::CompareStrategiesRequest,
                                        v1::CompareStrategiesResponse>* call);
  absl::Status StartSimulate(
      MessageCall<v1::SimulatePlanRequest, v1::SimulatePlanResponse>* call);
  // Starts a read of the step, which ends `call` by `done`.
  void Read(
      Call* call, bool has_key, const v1::PlanKey& key,
      std::function<absl::Status(const std::shared_ptr<const SealedPlan>&)>
          done);

  std::atomic<bool> refuses_ = false;
  PlannerCore* const core_;
  Metrics* const metrics_;
  const TokenAuth* const auth_;
  const SimulateFunction simulate_;
};

}  // namespace pipeweaver::server

#endif  // SERVER_PLANNER_SERVICE_H_
