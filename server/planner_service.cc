// See planner_service.h.

#include "server/planner_service.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "google/protobuf/io/coded_stream.h"
#include "profiler/profile_file.h"
#include "proto/digest/digest.h"
#include "semu/base/status_macros.h"
#include "semu/cost/measured/profile_layers.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "server/grpc_status.h"
#include "server/program_codec.h"

namespace pipeweaver::server {
namespace {

constexpr size_t kMaxRequestId = 63;
// Far above what counting up from a server's start comes to.
constexpr uint64_t kMaxAttempt = (uint64_t{1} << 40) - 1;
constexpr uint64_t kMaxStep = (uint64_t{1} << 62) - 1;
constexpr int64_t kMaxNeededInSeconds = 86'400;
constexpr int64_t kMaxJointWaitSeconds = 600;
// Sums over replicas stay far from 2^63.
constexpr int64_t kMostEvaluations = 1'000'000'000'000;
// Several times as many as are held of a job; they are read on a thread that
// answers calls, in some tens of milliseconds.
constexpr int kMaxProfilePoints = 8 * JobCosts::kMaxLayers;
constexpr uint64_t kMaxChunkBytes = 1 << 20;
constexpr int kMaxSimulationRuns = 1000;
constexpr double kMaxLinkFactor = 1e6;

absl::StatusOr<StepKey> KeyFromProto(bool present, const v1::PlanKey& proto) {
  if (!present) return absl::InvalidArgumentError("key: missing");
  PW_RETURN_IF_ERROR(semu::ValidateName("key.job", proto.job()));
  if (proto.step() > kMaxStep) {
    return absl::InvalidArgumentError(
        absl::StrCat("key.step: ", proto.step(), ", must be below 2^62"));
  }
  return StepKey{proto.job(), proto.attempt(), proto.step(), proto.replica()};
}

absl::StatusOr<Clock::Duration> DurationFromProto(
    absl::string_view field, const google::protobuf::Duration& duration,
    int64_t most_seconds) {
  if (duration.seconds() < 0 || duration.seconds() > most_seconds) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, ".seconds: ", duration.seconds(), ", must be 0 .. ",
                     most_seconds));
  }
  if (duration.nanos() < 0 || duration.nanos() > 999'999'999) {
    return absl::InvalidArgumentError(absl::StrCat(
        field, ".nanos: ", duration.nanos(), ", must be 0 .. 999999999"));
  }
  return std::chrono::seconds(duration.seconds()) +
         std::chrono::nanoseconds(duration.nanos());
}

absl::Status CheckBudget(int64_t budget_evaluations) {
  if (budget_evaluations >= 0 && budget_evaluations <= kMostEvaluations) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("budget_evaluations: ", budget_evaluations,
                   ", must be 0 to ", kMostEvaluations));
}

absl::Status CheckMayMove(const v1::SubmitStepRequest& request,
                          const semu::Job& job) {
  std::string lacks;
  if (!request.has_joint_wait()) {
    lacks = "joint_wait is not set";
  } else if (job.parallelism.data_parallel < 2) {
    lacks = absl::StrCat("parallelism.data_parallel of job '", job.name,
                         "' is 1: there is no other replica");
  } else if (!job.executor.moved_microbatches) {
    lacks = absl::StrCat("executor.moved_microbatches of job '", job.name,
                         "' is not set");
  }
  if (lacks.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("move_microbatches: true, must be false where ", lacks));
}

// The call's deadline on the clock that searches are timed by.
Clock::TimePoint SteadyDeadline(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) {
    return Clock::TimePoint::max();
  }
  return std::chrono::steady_clock::now() +
         (deadline - std::chrono::system_clock::now());
}

// Field numbers and wire types of GetProgramResponse, written by hand so that
// the data can follow by reference.
constexpr uint8_t kTotalBytesTag =
    v1::GetProgramResponse::kTotalBytesFieldNumber << 3;
constexpr uint8_t kDataTag = v1::GetProgramResponse::kDataFieldNumber << 3 | 2;

// Bytes of the program from `offset` that one answer may hold.
uint64_t ChunkSize(const std::string& program, uint64_t offset,
                   uint32_t max_bytes) {
  const uint64_t most = max_bytes == 0
                            ? kMaxChunkBytes
                            : std::min<uint64_t>(max_bytes, kMaxChunkBytes);
  return std::min<uint64_t>(most, program.size() - offset);
}

// REQUIRES: the chunk was answered.
bool IsLastChunk(const SealedPlan& sealed,
                 const v1::GetProgramRequest& request) {
  const std::string& program = sealed.programs[request.rank()];
  return request.offset() +
             ChunkSize(program, request.offset(), request.max_bytes()) ==
         program.size();
}

// A serialised GetProgramResponse, whose data is part of `sealed` and keeps it
// alive until it is sent. Errors: see GetProgram in planner_service.proto.
absl::StatusOr<grpc::ByteBuffer> ProgramResponse(
    const std::shared_ptr<const SealedPlan>& sealed, uint32_t rank,
    uint64_t offset, uint32_t max_bytes) {
  if (sealed->shadow) {
    return absl::FailedPreconditionError(
        absl::StrCat("key: ", DebugString(sealed->identity.key),
                     " is a shadow step, its programs are not read"));
  }
  if (rank >= sealed->programs.size()) {
    return absl::OutOfRangeError(
        absl::StrCat("rank: ", rank, " is not below ", sealed->programs.size(),
                     ", the pipeline ranks of the job"));
  }
  const std::string& program = sealed->programs[rank];
  if (offset > program.size()) {
    return absl::OutOfRangeError(absl::StrCat(
        "offset: ", offset, " is past the program's end, ", program.size()));
  }
  const uint64_t size = ChunkSize(program, offset, max_bytes);
  using google::protobuf::io::CodedOutputStream;
  uint8_t head[24];
  uint8_t* end = head;
  *end++ = kTotalBytesTag;
  end = CodedOutputStream::WriteVarint64ToArray(program.size(), end);
  if (size == 0) {
    const grpc::Slice slice(head, end - head);
    return grpc::ByteBuffer(&slice, 1);
  }
  *end++ = kDataTag;
  end = CodedOutputStream::WriteVarint64ToArray(size, end);
  const auto release = [](void* owner) {
    delete static_cast<std::shared_ptr<const SealedPlan>*>(owner);
  };
  const grpc::Slice slices[] = {
      grpc::Slice(head, end - head),
      grpc::Slice(const_cast<char*>(program.data()) + offset, size, release,
                  new std::shared_ptr<const SealedPlan>(sealed))};
  return grpc::ByteBuffer(slices, 2);
}

absl::StatusOr<Registration> ReadRegistration(
    const v1::RegisterJobRequest& request) {
  if (request.request_id().empty() ||
      request.request_id().size() > kMaxRequestId) {
    return absl::InvalidArgumentError(
        absl::StrCat("request_id: ", request.request_id().size(),
                     " characters, must be 1 .. ", kMaxRequestId));
  }
  if (!request.has_job()) return absl::InvalidArgumentError("job: missing");
  if (request.attempt() > kMaxAttempt) {
    return absl::InvalidArgumentError(
        absl::StrCat("attempt: ", request.attempt(), ", must be below 2^40"));
  }
  Registration registration;
  registration.request_id = request.request_id();
  registration.attempt = request.attempt();
  PW_ASSIGN_OR_RETURN(registration.job, semu::JobFromProto(request.job()));
  if (request.job().has_layout()) {
    PW_ASSIGN_OR_RETURN(
        semu::Layout layout,
        semu::LayoutFromProto(request.job().layout(), registration.job));
    registration.pinned_digest =
        CanonicalDigest(semu::LayoutToProto(layout, registration.job));
    registration.pinned = std::move(layout);
  }
  PW_ASSIGN_OR_RETURN(
      registration.samples,
      semu::SampleBatchesFromProto(request.sample_batches(), registration.job));
  v1::Job job = request.job();
  job.clear_layout();
  registration.job_bytes = CanonicalBytes(job);
  registration.job_digest = Sha256(registration.job_bytes);
  return registration;
}

void WriteJob(const RegisteredJob& job, v1::RegisterJobResponse* response) {
  const search::PlannableJob& plannable = *job.plannable;
  response->set_job_digest(job.job_digest);
  response->set_attempt(job.attempt);
  *response->mutable_layout() =
      semu::LayoutToProto(plannable.layout, plannable.job);
  response->set_layout_digest(job.layout_digest);
  response->set_layout_confirmed(job.layout_confirmed);
  response->mutable_activation_limit_bytes()->Add(
      plannable.activation_limit_bytes.begin(),
      plannable.activation_limit_bytes.end());
}

void WriteCosts(const RegisteredJob& job, v1::JobCosts* costs) {
  const CostVersion& version = *job.cost_version;
  costs->set_version(version.number);
  costs->set_profile_digest(job.profile_digest);
  costs->set_measured_layers(version.measured_layers);
  const semu::Calibration& calibration = version.calibration;
  costs->set_observations(calibration.observations);
  costs->set_error_before(calibration.error_before);
  costs->set_error_after(calibration.error_after);
  constexpr v1::LayerPass kPasses[semu::kNumCostPasses] = {
      v1::LAYER_PASS_FORWARD, v1::LAYER_PASS_INPUT_GRAD,
      v1::LAYER_PASS_WEIGHT_GRAD};
  for (int part = 0; part < semu::kNumCostParts; ++part) {
    if (calibration.factors[part] == 1) continue;
    v1::CostFactor* factor = costs->add_factors();
    // The proto's kinds are the model's, behind UNSPECIFIED.
    factor->set_layer(
        static_cast<v1::LayerKind>(part / semu::kNumCostPasses + 1));
    factor->set_pass(kPasses[part % semu::kNumCostPasses]);
    factor->set_factor(calibration.factors[part]);
  }
  costs->mutable_extra_reserve_bytes()->Add(
      job.plannable->extra_reserve_bytes.begin(),
      job.plannable->extra_reserve_bytes.end());
  costs->set_drifted_steps(job.costs->drifted_steps());
}

// REQUIRES: the first outcome is the planner's own.
void WriteOutcomes(const std::vector<StrategyOutcome>& outcomes,
                   v1::CompareStrategiesResponse* response) {
  const absl::StatusOr<search::StepReport>& own = outcomes.front().report;
  for (const StrategyOutcome& outcome : outcomes) {
    v1::StrategyOutcome* proto = response->add_outcomes();
    proto->set_strategy(outcome.strategy);
    if (!outcome.report.ok()) {
      proto->set_error(std::string(outcome.report.status().message()));
      continue;
    }
    *proto->mutable_report() = ReportToProto(*outcome.report);
    if (own.ok() && own->makespan_ns > 0) {
      proto->set_planner_gain(static_cast<double>(outcome.report->makespan_ns) /
                                  static_cast<double>(own->makespan_ns) -
                              1);
    }
  }
}

absl::StatusOr<Simulation> ReadSimulation(
    const v1::SimulatePlanRequest& request) {
  const std::pair<const char*, double> factors[] = {
      {"latency_factor", request.latency_factor()},
      {"bandwidth_factor", request.bandwidth_factor()}};
  for (const auto& [field, factor] : factors) {
    // Written so that NaN fails too.
    if (!(factor == 0 ||
          (factor >= 1 / kMaxLinkFactor && factor <= kMaxLinkFactor))) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, ": ", factor, ", must be 0 or 1e-6 .. 1e6"));
    }
  }
  if (!(request.duration_noise() >= 0 && request.duration_noise() <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "duration_noise: ", request.duration_noise(), ", must be 0 .. 1"));
  }
  if (request.runs() < 0 || request.runs() > kMaxSimulationRuns) {
    return absl::InvalidArgumentError(absl::StrCat(
        "runs: ", request.runs(), ", must be 0 .. ", kMaxSimulationRuns));
  }
  Simulation simulation;
  if (request.latency_factor() != 0) {
    simulation.latency_factor = request.latency_factor();
  }
  if (request.bandwidth_factor() != 0) {
    simulation.bandwidth_factor = request.bandwidth_factor();
  }
  simulation.duration_noise = request.duration_noise();
  simulation.runs = std::max(1, request.runs());
  simulation.seed = request.seed();
  return simulation;
}

}  // namespace

// One call: from its handler to its end, measured.
class PlannerServiceImpl::Call : public grpc::ServerUnaryReactor {
 public:
  Call(Metrics* metrics, RpcMethod method)
      : metrics_(metrics),
        method_(method),
        started_(std::chrono::steady_clock::now()) {
    metrics_->BeginRpc();
  }

  // Ends the call; nothing of it may be touched after.
  void End(const absl::Status& status) {
    if (status.ok()) WriteResponse();
    metrics_->CountRpc(method_, status.code(),
                       std::chrono::steady_clock::now() - started_);
    Finish(ToGrpcStatus(status));
  }

  // Set when the call is cancelled.
  const CancelFlag& cancelled() const { return cancelled_; }
  // Called when the call is cancelled, after the handler has returned.
  void set_on_cancel(std::function<void()> on_cancel) {
    on_cancel_ = std::move(on_cancel);
  }

 private:
  virtual void WriteResponse() = 0;
  void OnCancel() override {
    cancelled_->store(true);
    if (on_cancel_ != nullptr) on_cancel_();
  }
  void OnDone() override { delete this; }

  Metrics* const metrics_;
  const RpcMethod method_;
  const std::chrono::steady_clock::time_point started_;
  const CancelFlag cancelled_ = std::make_shared<std::atomic<bool>>(false);
  std::function<void()> on_cancel_;
};

template <typename Request, typename Response>
class PlannerServiceImpl::MessageCall final : public Call {
 public:
  MessageCall(Metrics* metrics, RpcMethod method, grpc::ByteBuffer* out)
      : Call(metrics, method), out_(out) {}

  absl::Status Parse(const grpc::ByteBuffer& bytes) {
    grpc::ByteBuffer slices(bytes);  // shared, not copied
    if (grpc::SerializationTraits<Request>::Deserialize(&slices, &request)
            .ok()) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(
        absl::StrCat("request: its ", bytes.Length(), " bytes are not a ",
                     Request::descriptor()->full_name()));
  }

  // Answers these bytes in place of `response`.
  void SetBytes(grpc::ByteBuffer bytes) {
    out_->Swap(&bytes);
    written_ = true;
  }

  Request request;
  Response response;

 private:
  void WriteResponse() override {
    if (written_) return;
    bool own_buffer;
    grpc::SerializationTraits<Response>::Serialize(response, out_, &own_buffer);
  }

  grpc::ByteBuffer* const out_;
  bool written_ = false;
};

PlannerServiceImpl::PlannerServiceImpl(PlannerCore* core, Metrics* metrics,
                                       const TokenAuth* auth,
                                       SimulateFunction simulate)
    : core_(core),
      metrics_(metrics),
      auth_(auth),
      simulate_(std::move(simulate)) {}

absl::Status PlannerServiceImpl::Admit(
    const grpc::CallbackServerContext& context) const {
  if (refuses_) return absl::UnavailableError("the server shuts down");
  if (auth_->required()) {
    const auto& metadata = context.client_metadata();
    const auto header = metadata.find("authorization");
    PW_RETURN_IF_ERROR(auth_->Check(
        header == metadata.end()
            ? absl::string_view()
            : absl::string_view(header->second.data(), header->second.size())));
  }
  if (context.deadline() <= std::chrono::system_clock::now()) {
    return absl::DeadlineExceededError(
        "the call's deadline had passed when it arrived");
  }
  return absl::OkStatus();
}

template <typename Request, typename Response, typename Handle>
grpc::ServerUnaryReactor* PlannerServiceImpl::Start(
    RpcMethod method, grpc::CallbackServerContext* context,
    const grpc::ByteBuffer* request, grpc::ByteBuffer* response,
    Handle handle) {
  auto* call = new MessageCall<Request, Response>(metrics_, method, response);
  absl::Status status = Admit(*context);
  if (status.ok()) status = call->Parse(*request);
  if (status.ok()) {
    handle(call);
  } else {
    call->End(status);
  }
  return call;
}

template <typename Request, typename Response, typename Handle>
grpc::ServerUnaryReactor* PlannerServiceImpl::Answer(
    RpcMethod method, grpc::CallbackServerContext* context,
    const grpc::ByteBuffer* request, grpc::ByteBuffer* response,
    Handle handle) {
  return Start<Request, Response>(
      method, context, request, response,
      [&handle](MessageCall<Request, Response>* call) {
        call->End(handle(call->request, &call->response));
      });
}

grpc::ServerUnaryReactor* PlannerServiceImpl::RegisterJob(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Start<v1::RegisterJobRequest, v1::RegisterJobResponse>(
      RpcMethod::kRegisterJob, context, request, response, [this](auto* call) {
        absl::StatusOr<Registration> registration =
            ReadRegistration(call->request);
        // It may wait, and samples are large.
        call->request.clear_sample_batches();
        if (!registration.ok()) {
          call->End(registration.status());
          return;
        }
        call->set_on_cancel([core = core_] { core->DropCancelled(); });
        core_->RegisterJob(
            *std::move(registration), call->cancelled(),
            [call](absl::StatusOr<std::shared_ptr<const RegisteredJob>> job) {
              if (job.ok()) WriteJob(**job, &call->response);
              call->End(job.status());
            });
      });
}

grpc::ServerUnaryReactor* PlannerServiceImpl::ConfirmLayout(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::ConfirmLayoutRequest, v1::ConfirmLayoutResponse>(
      RpcMethod::kConfirmLayout, context, request, response,
      [this](const v1::ConfirmLayoutRequest& in,
             v1::ConfirmLayoutResponse*) -> absl::Status {
        PW_RETURN_IF_ERROR(semu::ValidateName("job", in.job()));
        return core_->ConfirmLayout(in.job(), in.attempt(), in.layout_digest());
      });
}

absl::Status PlannerServiceImpl::Describe(
    const v1::DescribeJobRequest& request,
    v1::DescribeJobResponse* response) const {
  PW_RETURN_IF_ERROR(semu::ValidateName("job", request.job()));
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const RegisteredJob> job,
                      core_->registry().Find(request.job()));
  PW_ASSIGN_OR_RETURN(JobStats stats, core_->registry().Stats(request.job()));
  response->mutable_job()->ParseFromString(job->job_bytes);
  response->set_job_digest(job->job_digest);
  response->set_attempt(job->attempt);
  response->set_request_id(job->request_id);
  *response->mutable_layout() =
      semu::LayoutToProto(job->plannable->layout, job->plannable->job);
  response->set_layout_digest(job->layout_digest);
  response->set_layout_confirmed(job->layout_confirmed);
  response->set_steps_held(core_->HeldSteps(request.job()));
  response->mutable_plans_by_origin()->Add(stats.plans_by_origin.begin(),
                                           stats.plans_by_origin.end());
  response->set_reports(stats.reports);
  response->set_measured_over_predicted(stats.measured_over_predicted);
  WriteCosts(*job, response->mutable_costs());
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* PlannerServiceImpl::DescribeJob(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::DescribeJobRequest, v1::DescribeJobResponse>(
      RpcMethod::kDescribeJob, context, request, response,
      [this](const auto& in, auto* out) { return Describe(in, out); });
}

grpc::ServerUnaryReactor* PlannerServiceImpl::ListJobs(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::ListJobsRequest, v1::ListJobsResponse>(
      RpcMethod::kListJobs, context, request, response,
      [this](const v1::ListJobsRequest&, v1::ListJobsResponse* out) {
        for (std::string& name : core_->registry().Names()) {
          out->add_jobs(std::move(name));
        }
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* PlannerServiceImpl::RemoveJob(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::RemoveJobRequest, v1::RemoveJobResponse>(
      RpcMethod::kRemoveJob, context, request, response,
      [this](const v1::RemoveJobRequest& in,
             v1::RemoveJobResponse*) -> absl::Status {
        PW_RETURN_IF_ERROR(semu::ValidateName("job", in.job()));
        return core_->RemoveJob(in.job());
      });
}

absl::Status PlannerServiceImpl::Submit(
    const grpc::CallbackServerContext& context,
    const v1::SubmitStepRequest& request, v1::SubmitStepResponse* response) {
  StepSubmission submission;
  PW_ASSIGN_OR_RETURN(submission.key,
                      KeyFromProto(request.has_key(), request.key()));
  PW_ASSIGN_OR_RETURN(submission.job, core_->CheckKey(submission.key));
  if (!request.has_batch()) return absl::InvalidArgumentError("batch: missing");
  if (request.has_needed_in()) {
    PW_ASSIGN_OR_RETURN(submission.needed_in,
                        DurationFromProto("needed_in", request.needed_in(),
                                          kMaxNeededInSeconds));
  }
  if (request.has_joint_wait()) {
    PW_ASSIGN_OR_RETURN(submission.joint_wait,
                        DurationFromProto("joint_wait", request.joint_wait(),
                                          kMaxJointWaitSeconds));
  }
  if (request.move_microbatches()) {
    PW_RETURN_IF_ERROR(CheckMayMove(request, submission.job->plannable->job));
    submission.move_microbatches = true;
  }
  submission.duration_noise = request.duration_noise();
  if (!(submission.duration_noise >= 0 && submission.duration_noise <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "duration_noise: ", submission.duration_noise, ", must be 0 .. 1"));
  }
  // As plans record it.
  submission.duration_noise = std::round(1e6 * submission.duration_noise) / 1e6;
  if (request.has_joint_wait() && submission.duration_noise > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("duration_noise: ", submission.duration_noise,
                     ", must be 0 where joint_wait is set"));
  }
  PW_RETURN_IF_ERROR(CheckBudget(request.budget_evaluations()));
  PW_ASSIGN_OR_RETURN(
      submission.batch,
      semu::BatchFromProto(request.batch(), submission.job->plannable->job));
  submission.layout_digest = request.layout_digest();
  submission.batch_digest = CanonicalDigest(request.batch());
  submission.batch_bytes = semu::HeldBytes(submission.batch);
  submission.seed = request.seed();
  submission.budget_evaluations = request.budget_evaluations();
  submission.shadow = request.shadow();
  response->set_batch_digest(submission.batch_digest);
  if (context.IsCancelled()) {
    return absl::CancelledError("the call was cancelled");
  }
  return core_->SubmitStep(std::move(submission));
}

grpc::ServerUnaryReactor* PlannerServiceImpl::SubmitStep(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::SubmitStepRequest, v1::SubmitStepResponse>(
      RpcMethod::kSubmitStep, context, request, response,
      [this, context](const auto& in, auto* out) {
        return Submit(*context, in, out);
      });
}

grpc::ServerUnaryReactor* PlannerServiceImpl::CancelStep(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::CancelStepRequest, v1::CancelStepResponse>(
      RpcMethod::kCancelStep, context, request, response,
      [this](const v1::CancelStepRequest& in,
             v1::CancelStepResponse*) -> absl::Status {
        PW_ASSIGN_OR_RETURN(StepKey key, KeyFromProto(in.has_key(), in.key()));
        return core_->CancelStep(key);
      });
}

void PlannerServiceImpl::Read(
    Call* call, bool has_key, const v1::PlanKey& proto,
    std::function<absl::Status(const std::shared_ptr<const SealedPlan>&)>
        done) {
  const absl::StatusOr<StepKey> key = KeyFromProto(has_key, proto);
  if (!key.ok()) {
    call->End(key.status());
    return;
  }
  const uint64_t handle = core_->ReadStep(
      *key, [call, done = std::move(done)](const StepResult& result) {
        call->End(result.ok() ? done(*result) : result.status());
      });
  // The call is not over before its handler returns, even if it was ended.
  if (handle != 0) {
    call->set_on_cancel(
        [core = core_, key = *key, handle] { core->CancelRead(key, handle); });
  }
}

grpc::ServerUnaryReactor* PlannerServiceImpl::GetPlan(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Start<v1::GetPlanRequest, v1::GetPlanResponse>(
      RpcMethod::kGetPlan, context, request, response, [this](auto* call) {
        Read(call, call->request.has_key(), call->request.key(),
             [call](const std::shared_ptr<const SealedPlan>& sealed) {
               call->response.mutable_plan()->ParseFromString(
                   sealed->plan_bytes);
               return absl::OkStatus();
             });
      });
}

grpc::ServerUnaryReactor* PlannerServiceImpl::GetProgram(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Start<v1::GetProgramRequest, v1::GetProgramResponse>(
      RpcMethod::kGetProgram, context, request, response, [this](auto* call) {
        const v1::GetProgramRequest& in = call->request;
        const auto job = core_->registry().Find(in.key().job());
        if (job.ok() &&
            in.rank() >= (*job)->plannable->activation_limit_bytes.size()) {
          call->End(absl::OutOfRangeError(absl::StrCat(
              "rank: ", in.rank(), " is not below ",
              (*job)->plannable->activation_limit_bytes.size(),
              ", the pipeline ranks of job '", in.key().job(), "'")));
          return;
        }
        Read(call, in.has_key(), in.key(),
             [this, call](const std::shared_ptr<const SealedPlan>& sealed)
                 -> absl::Status {
               PW_ASSIGN_OR_RETURN(grpc::ByteBuffer bytes,
                                   ProgramResponse(sealed, call->request.rank(),
                                                   call->request.offset(),
                                                   call->request.max_bytes()));
               call->SetBytes(std::move(bytes));
               if (IsLastChunk(*sealed, call->request)) {
                 core_->NoteFetched(sealed->identity.key, call->request.rank());
               }
               return absl::OkStatus();
             });
      });
}

absl::Status PlannerServiceImpl::Report(const v1::ReportStepRequest& request) {
  StepReportIn report;
  PW_ASSIGN_OR_RETURN(report.key,
                      KeyFromProto(request.has_key(), request.key()));
  report.plan_digest = request.plan_digest();
  report.rank = request.rank();
  report.num_start_offsets = request.start_offset_ns_size();
  report.duration_ns.assign(request.duration_ns().begin(),
                            request.duration_ns().end());
  report.step_ns = request.step_ns();
  report.peak_memory_bytes = request.peak_memory_bytes();
  return core_->ReportStep(std::move(report));
}

absl::Status PlannerServiceImpl::Upload(const v1::UploadProfileRequest& request,
                                        v1::UploadProfileResponse* response) {
  PW_RETURN_IF_ERROR(semu::ValidateName("job", request.job()));
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const RegisteredJob> job,
                      core_->registry().Find(request.job()));
  const int points = request.profile().points_size();
  if (points > kMaxProfilePoints) {
    return absl::InvalidArgumentError(absl::StrCat(
        "profile.points: ", points, ", must be at most ", kMaxProfilePoints));
  }
  if (const absl::Status status = profiler::ValidateProfile(request.profile());
      !status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("profile: ", status.message()));
  }
  const std::vector<semu::MeasuredLayer> layers =
      semu::MeasuredLayersOf(request.profile(), job->plannable->job);
  const auto taken = static_cast<int64_t>(layers.size());
  response->set_points_taken(taken);
  response->set_points_left_out(points - taken);
  return core_->AddMeasuredLayers(request.job(), layers);
}

grpc::ServerUnaryReactor* PlannerServiceImpl::UploadProfile(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::UploadProfileRequest, v1::UploadProfileResponse>(
      RpcMethod::kUploadProfile, context, request, response,
      [this](const auto& in, auto* out) { return Upload(in, out); });
}

grpc::ServerUnaryReactor* PlannerServiceImpl::ReportStep(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::ReportStepRequest, v1::ReportStepResponse>(
      RpcMethod::kReportStep, context, request, response,
      [this](const v1::ReportStepRequest& in, v1::ReportStepResponse*) {
        return Report(in);
      });
}

absl::Status PlannerServiceImpl::StartCompare(
    const grpc::CallbackServerContext& context,
    MessageCall<v1::CompareStrategiesRequest, v1::CompareStrategiesResponse>*
        call) {
  const v1::CompareStrategiesRequest& request = call->request;
  PW_RETURN_IF_ERROR(semu::ValidateName("job", request.job()));
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const RegisteredJob> job,
                      core_->registry().Find(request.job()));
  PW_RETURN_IF_ERROR(CheckBudget(request.budget_evaluations()));
  const std::vector<std::string> known = core_->StrategyNames();
  std::vector<std::string> strategies;
  for (const std::string& name : request.strategies()) {
    if (std::find(known.begin(), known.end(), name) == known.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("strategies: '", name, "', must be one of ",
                       absl::StrJoin(known, ", ")));
    }
    if (std::find(strategies.begin(), strategies.end(), name) !=
        strategies.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("strategies: '", name, "' is listed twice"));
    }
    strategies.push_back(name);
  }
  if (strategies.empty()) strategies = known;
  PW_ASSIGN_OR_RETURN(
      semu::Batch batch,
      semu::BatchFromProto(request.batch(), job->plannable->job));
  call->set_on_cancel([core = core_] { core->DropCancelled(); });
  core_->CompareStrategies(
      std::move(job), std::move(batch), std::move(strategies), request.seed(),
      request.budget_evaluations(), SteadyDeadline(context), call->cancelled(),
      [call](const absl::StatusOr<std::vector<StrategyOutcome>>& outcomes) {
        if (outcomes.ok()) WriteOutcomes(*outcomes, &call->response);
        call->End(outcomes.status());
      });
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* PlannerServiceImpl::CompareStrategies(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Start<v1::CompareStrategiesRequest, v1::CompareStrategiesResponse>(
      RpcMethod::kCompareStrategies, context, request, response,
      [this, context](auto* call) {
        if (absl::Status status = StartCompare(*context, call); !status.ok()) {
          call->End(status);
        }
      });
}

absl::Status PlannerServiceImpl::StartSimulate(
    MessageCall<v1::SimulatePlanRequest, v1::SimulatePlanResponse>* call) {
  PW_ASSIGN_OR_RETURN(
      StepKey key, KeyFromProto(call->request.has_key(), call->request.key()));
  PW_ASSIGN_OR_RETURN(Simulation simulation, ReadSimulation(call->request));
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const RegisteredJob> job,
                      core_->CheckKey(key));
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const SealedPlan> sealed,
                      core_->SealedStep(key));
  call->set_on_cancel([core = core_] { core->DropCancelled(); });
  core_->RunQuestion(
      key.job, call->cancelled(),
      [this, call, job, sealed, simulation](const absl::Status& status,
                                            const std::atomic<bool>& end) {
        if (!status.ok()) {
          call->End(status);
          return;
        }
        const absl::StatusOr<std::vector<int64_t>> makespans =
            simulate_(*job->plannable, *sealed->plan, simulation, end);
        if (makespans.ok()) {
          call->response.mutable_makespan_ns()->Add(makespans->begin(),
                                                    makespans->end());
        }
        call->End(absl::IsCancelled(makespans.status()) &&
                          !call->cancelled()->load()
                      ? absl::UnavailableError("the server shuts down")
                      : makespans.status());
      });
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* PlannerServiceImpl::SimulatePlan(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Start<v1::SimulatePlanRequest, v1::SimulatePlanResponse>(
      RpcMethod::kSimulatePlan, context, request, response, [this](auto* call) {
        if (absl::Status status = StartSimulate(call); !status.ok()) {
          call->End(status);
        }
      });
}

}  // namespace pipeweaver::server
