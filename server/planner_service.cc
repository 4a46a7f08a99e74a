// See planner_service.h.

#include "server/planner_service.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "proto/digest/digest.h"
#include "semu/base/status_macros.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "server/grpc_status.h"
#include "server/program_codec.h"

namespace pipeweaver::server {
namespace {

constexpr size_t kMaxRequestId = 63;
constexpr int64_t kMaxNeededInSeconds = 86'400;
constexpr uint64_t kMaxChunkBytes = 1 << 20;
constexpr int kMaxSimulationRuns = 1000;
constexpr double kMaxLinkFactor = 1e6;

absl::StatusOr<StepKey> KeyFromProto(bool present, const v1::PlanKey& proto) {
  if (!present) return absl::InvalidArgumentError("key: missing");
  PW_RETURN_IF_ERROR(semu::ValidateName("key.job", proto.job()));
  return StepKey{proto.job(), proto.attempt(), proto.step(), proto.replica()};
}

absl::StatusOr<std::optional<Clock::Duration>> NeededIn(
    const v1::SubmitStepRequest& request) {
  if (!request.has_needed_in()) return std::nullopt;
  const auto& needed_in = request.needed_in();
  if (needed_in.seconds() < 0 || needed_in.seconds() > kMaxNeededInSeconds) {
    return absl::InvalidArgumentError(
        absl::StrCat("needed_in.seconds: ", needed_in.seconds(),
                     ", must be 0 .. ", kMaxNeededInSeconds));
  }
  if (needed_in.nanos() < 0 || needed_in.nanos() > 999'999'999) {
    return absl::InvalidArgumentError(absl::StrCat(
        "needed_in.nanos: ", needed_in.nanos(), ", must be 0 .. 999999999"));
  }
  return std::chrono::seconds(needed_in.seconds()) +
         std::chrono::nanoseconds(needed_in.nanos());
}

absl::Status CheckBudget(int64_t budget_evaluations) {
  if (budget_evaluations >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "budget_evaluations: ", budget_evaluations, ", must not be below 0"));
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

// Serialised GetProgramResponse with program[offset, offset + size) as its
// data, which keeps `sealed` alive until it is sent.
grpc::ByteBuffer ProgramResponse(std::shared_ptr<const SealedPlan> sealed,
                                 const std::string& program, uint64_t offset,
                                 uint64_t size) {
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
                  new std::shared_ptr<const SealedPlan>(std::move(sealed)))};
  return grpc::ByteBuffer(slices, 2);
}

}  // namespace

// One call: from its handler to its end, measured.
class PlannerServiceImpl::Call final : public grpc::ServerUnaryReactor {
 public:
  Call(Metrics* metrics, RpcMethod method)
      : metrics_(metrics),
        method_(method),
        started_(std::chrono::steady_clock::now()) {}

  // Ends the call; returns itself, so that a handler can return it.
  Call* End(const absl::Status& status) {
    metrics_->CountRpc(method_, status.code(),
                       std::chrono::steady_clock::now() - started_);
    Finish(ToGrpcStatus(status));
    return this;
  }

  // Set when the call is cancelled.
  const CancelFlag& cancelled() const { return cancelled_; }
  // Called when the call is cancelled, after the handler has returned.
  void set_on_cancel(std::function<void()> on_cancel) {
    on_cancel_ = std::move(on_cancel);
  }

 private:
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

PlannerServiceImpl::PlannerServiceImpl(PlannerCore* core, Metrics* metrics,
                                       const TokenAuth* auth,
                                       SimulateFunction simulate)
    : core_(core),
      metrics_(metrics),
      auth_(auth),
      simulate_(std::move(simulate)) {}

absl::Status PlannerServiceImpl::Admit(
    const grpc::CallbackServerContext& context) const {
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

absl::StatusOr<Registration> PlannerServiceImpl::ReadRegistration(
    const v1::RegisterJobRequest& request) const {
  if (request.request_id().empty() ||
      request.request_id().size() > kMaxRequestId) {
    return absl::InvalidArgumentError(
        absl::StrCat("request_id: ", request.request_id().size(),
                     " characters, must be 1 .. ", kMaxRequestId));
  }
  if (!request.has_job()) return absl::InvalidArgumentError("job: missing");
  Registration registration;
  registration.request_id = request.request_id();
  PW_ASSIGN_OR_RETURN(registration.job, semu::JobFromProto(request.job()));
  if (request.job().has_layout()) {
    PW_ASSIGN_OR_RETURN(
        semu::Layout layout,
        semu::LayoutFromProto(request.job().layout(), registration.job));
    registration.pinned_digest =
        CanonicalDigest(semu::LayoutToProto(layout, registration.job));
    registration.pinned = std::move(layout);
  }
  v1::Job job = request.job();
  job.clear_layout();
  registration.job_bytes = CanonicalBytes(job);
  registration.job_digest = Sha256(registration.job_bytes);
  return registration;
}

grpc::ServerUnaryReactor* PlannerServiceImpl::RegisterJob(
    grpc::CallbackServerContext* context, const v1::RegisterJobRequest* request,
    v1::RegisterJobResponse* response) {
  Call* call = new Call(metrics_, RpcMethod::kRegisterJob);
  if (absl::Status status = Admit(*context); !status.ok()) {
    return call->End(status);
  }
  absl::StatusOr<Registration> registration = ReadRegistration(*request);
  if (!registration.ok()) return call->End(registration.status());
  core_->RegisterJob(
      *std::move(registration), call->cancelled(),
      [call, response](
          absl::StatusOr<std::shared_ptr<const RegisteredJob>> registered) {
        if (!registered.ok()) {
          call->End(registered.status());
          return;
        }
        const RegisteredJob& job = **registered;
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
        call->End(absl::OkStatus());
      });
  return call;
}

grpc::ServerUnaryReactor* PlannerServiceImpl::ConfirmLayout(
    grpc::CallbackServerContext* context,
    const v1::ConfirmLayoutRequest* request, v1::ConfirmLayoutResponse*) {
  Call* call = new Call(metrics_, RpcMethod::kConfirmLayout);
  absl::Status status = Admit(*context);
  if (status.ok()) status = semu::ValidateName("job", request->job());
  if (status.ok()) {
    status = core_->ConfirmLayout(request->job(), request->attempt(),
                                  request->layout_digest());
  }
  return call->End(status);
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
  *response->mutable_layout() =
      semu::LayoutToProto(job->plannable->layout, job->plannable->job);
  response->set_layout_digest(job->layout_digest);
  response->set_layout_confirmed(job->layout_confirmed);
  response->set_steps_held(core_->HeldSteps(request.job()));
  response->mutable_plans_by_origin()->Add(stats.plans_by_origin.begin(),
                                           stats.plans_by_origin.end());
  response->set_reports(stats.reports);
  response->set_measured_over_predicted(stats.measured_over_predicted);
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* PlannerServiceImpl::DescribeJob(
    grpc::CallbackServerContext* context, const v1::DescribeJobRequest* request,
    v1::DescribeJobResponse* response) {
  Call* call = new Call(metrics_, RpcMethod::kDescribeJob);
  absl::Status status = Admit(*context);
  if (status.ok()) status = Describe(*request, response);
  return call->End(status);
}

grpc::ServerUnaryReactor* PlannerServiceImpl::ListJobs(
    grpc::CallbackServerContext* context, const v1::ListJobsRequest*,
    v1::ListJobsResponse* response) {
  Call* call = new Call(metrics_, RpcMethod::kListJobs);
  const absl::Status status = Admit(*context);
  if (status.ok()) {
    for (std::string& name : core_->registry().Names()) {
      response->add_jobs(std::move(name));
    }
  }
  return call->End(status);
}

grpc::ServerUnaryReactor* PlannerServiceImpl::RemoveJob(
    grpc::CallbackServerContext* context, const v1::RemoveJobRequest* request,
    v1::RemoveJobResponse*) {
  Call* call = new Call(metrics_, RpcMethod::kRemoveJob);
  absl::Status status = Admit(*context);
  if (status.ok()) status = semu::ValidateName("job", request->job());
  if (status.ok()) status = core_->RemoveJob(request->job());
  return call->End(status);
}

absl::Status PlannerServiceImpl::Submit(
    const grpc::CallbackServerContext& context,
    const v1::SubmitStepRequest& request, v1::SubmitStepResponse* response) {
  StepSubmission submission;
  PW_ASSIGN_OR_RETURN(submission.key,
                      KeyFromProto(request.has_key(), request.key()));
  PW_ASSIGN_OR_RETURN(submission.job, core_->CheckKey(submission.key));
  if (!request.has_batch()) return absl::InvalidArgumentError("batch: missing");
  PW_ASSIGN_OR_RETURN(submission.needed_in, NeededIn(request));
  PW_RETURN_IF_ERROR(CheckBudget(request.budget_evaluations()));
  PW_ASSIGN_OR_RETURN(
      submission.batch,
      semu::BatchFromProto(request.batch(), submission.job->plannable->job));
  submission.layout_digest = request.layout_digest();
  submission.batch_digest = CanonicalDigest(request.batch());
  submission.batch_bytes = static_cast<int64_t>(request.batch().ByteSizeLong());
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
    grpc::CallbackServerContext* context, const v1::SubmitStepRequest* request,
    v1::SubmitStepResponse* response) {
  Call* call = new Call(metrics_, RpcMethod::kSubmitStep);
  absl::Status status = Admit(*context);
  if (status.ok()) status = Submit(*context, *request, response);
  return call->End(status);
}

grpc::ServerUnaryReactor* PlannerServiceImpl::CancelStep(
    grpc::CallbackServerContext* context, const v1::CancelStepRequest* request,
    v1::CancelStepResponse*) {
  Call* call = new Call(metrics_, RpcMethod::kCancelStep);
  if (absl::Status status = Admit(*context); !status.ok()) {
    return call->End(status);
  }
  const absl::StatusOr<StepKey> key =
      KeyFromProto(request->has_key(), request->key());
  return call->End(key.ok() ? core_->CancelStep(*key) : key.status());
}

void PlannerServiceImpl::Read(
    Call* call, const v1::PlanKey& proto,
    std::function<absl::Status(const std::shared_ptr<const SealedPlan>&)>
        done) {
  const absl::StatusOr<StepKey> key = KeyFromProto(true, proto);
  if (!key.ok()) {
    call->End(key.status());
    return;
  }
  const uint64_t handle = core_->ReadStep(
      *key, [call, done = std::move(done)](const StepResult& result) {
        call->End(result.ok() ? done(*result) : result.status());
      });
  if (handle != 0) {
    call->set_on_cancel(
        [core = core_, key = *key, handle] { core->CancelRead(key, handle); });
  }
}

grpc::ServerUnaryReactor* PlannerServiceImpl::GetPlan(
    grpc::CallbackServerContext* context, const v1::GetPlanRequest* request,
    v1::GetPlanResponse* response) {
  Call* call = new Call(metrics_, RpcMethod::kGetPlan);
  if (absl::Status status = Admit(*context); !status.ok()) {
    return call->End(status);
  }
  Read(call, request->key(),
       [response](const std::shared_ptr<const SealedPlan>& sealed) {
         response->mutable_plan()->ParseFromString(sealed->plan_bytes);
         return absl::OkStatus();
       });
  return call;
}

grpc::ServerUnaryReactor* PlannerServiceImpl::GetProgram(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* bytes,
    grpc::ByteBuffer* response) {
  Call* call = new Call(metrics_, RpcMethod::kGetProgram);
  if (absl::Status status = Admit(*context); !status.ok()) {
    return call->End(status);
  }
  v1::GetProgramRequest request;
  grpc::ByteBuffer copy(*bytes);  // shares the slices
  if (!grpc::SerializationTraits<v1::GetProgramRequest>::Deserialize(&copy,
                                                                     &request)
           .ok()) {
    return call->End(
        absl::InternalError("the request's bytes are no GetProgramRequest"));
  }
  const uint32_t rank = request.rank();
  const auto job = core_->registry().Find(request.key().job());
  if (job.ok() && rank >= (*job)->plannable->activation_limit_bytes.size()) {
    return call->End(absl::OutOfRangeError(absl::StrCat(
        "rank: ", rank, " is not below ",
        (*job)->plannable->activation_limit_bytes.size(),
        ", the pipeline ranks of job '", request.key().job(), "'")));
  }
  const uint64_t offset = request.offset();
  const uint64_t most =
      request.max_bytes() == 0
          ? kMaxChunkBytes
          : std::min<uint64_t>(request.max_bytes(), kMaxChunkBytes);
  Read(call, request.key(),
       [this, rank, offset, most,
        response](const std::shared_ptr<const SealedPlan>& sealed) {
         if (sealed->shadow) {
           return absl::FailedPreconditionError(
               absl::StrCat("key: ", DebugString(sealed->identity.key),
                            " is a shadow step, its programs are not read"));
         }
         const std::string& program = sealed->programs[rank];
         if (offset > program.size()) {
           return absl::OutOfRangeError(
               absl::StrCat("offset: ", offset, " is past the program's end, ",
                            program.size()));
         }
         const uint64_t size =
             std::min<uint64_t>(most, program.size() - offset);
         *response = ProgramResponse(sealed, program, offset, size);
         if (offset + size == program.size()) {
           core_->NoteFetched(sealed->identity.key, rank);
         }
         return absl::OkStatus();
       });
  return call;
}

absl::Status PlannerServiceImpl::Report(const v1::ReportStepRequest& request) {
  StepReportIn report;
  PW_ASSIGN_OR_RETURN(report.key,
                      KeyFromProto(request.has_key(), request.key()));
  report.plan_digest = request.plan_digest();
  report.rank = request.rank();
  report.num_start_offsets = request.start_offset_ns_size();
  report.num_durations = request.duration_ns_size();
  report.step_ns = request.step_ns();
  return core_->ReportStep(report);
}

grpc::ServerUnaryReactor* PlannerServiceImpl::ReportStep(
    grpc::CallbackServerContext* context, const v1::ReportStepRequest* request,
    v1::ReportStepResponse*) {
  Call* call = new Call(metrics_, RpcMethod::kReportStep);
  absl::Status status = Admit(*context);
  if (status.ok()) status = Report(*request);
  return call->End(status);
}

grpc::ServerUnaryReactor* PlannerServiceImpl::CompareStrategies(
    grpc::CallbackServerContext* context,
    const v1::CompareStrategiesRequest* request,
    v1::CompareStrategiesResponse* response) {
  Call* call = new Call(metrics_, RpcMethod::kCompareStrategies);
  std::shared_ptr<const RegisteredJob> job;
  semu::Batch batch;
  std::vector<std::string> strategies(request->strategies().begin(),
                                      request->strategies().end());
  const auto read = [&]() -> absl::Status {
    PW_RETURN_IF_ERROR(Admit(*context));
    PW_RETURN_IF_ERROR(semu::ValidateName("job", request->job()));
    PW_ASSIGN_OR_RETURN(job, core_->registry().Find(request->job()));
    PW_RETURN_IF_ERROR(CheckBudget(request->budget_evaluations()));
    const std::vector<std::string> known = core_->StrategyNames();
    std::set<std::string> seen;
    for (const std::string& name : strategies) {
      if (std::find(known.begin(), known.end(), name) == known.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat("strategies: '", name, "' does not exist"));
      }
      if (!seen.insert(name).second) {
        return absl::InvalidArgumentError(
            absl::StrCat("strategies: '", name, "' is listed twice"));
      }
    }
    if (strategies.empty()) strategies = known;
    PW_ASSIGN_OR_RETURN(
        batch, semu::BatchFromProto(request->batch(), job->plannable->job));
    return absl::OkStatus();
  };
  if (absl::Status status = read(); !status.ok()) return call->End(status);
  core_->CompareStrategies(
      std::move(job), std::move(batch), std::move(strategies), request->seed(),
      request->budget_evaluations(), SteadyDeadline(*context),
      call->cancelled(),
      [call, response](absl::StatusOr<std::vector<StrategyOutcome>> outcomes) {
        if (!outcomes.ok()) {
          call->End(outcomes.status());
          return;
        }
        const absl::StatusOr<search::StepReport>& own =
            outcomes->front().report;
        for (const StrategyOutcome& outcome : *outcomes) {
          v1::StrategyOutcome* proto = response->add_outcomes();
          proto->set_strategy(outcome.strategy);
          if (!outcome.report.ok()) {
            proto->set_error(std::string(outcome.report.status().message()));
            continue;
          }
          *proto->mutable_report() = ReportToProto(*outcome.report);
          if (own.ok() && own->makespan_ns > 0) {
            proto->set_planner_gain(
                static_cast<double>(outcome.report->makespan_ns) /
                    static_cast<double>(own->makespan_ns) -
                1);
          }
        }
        call->End(absl::OkStatus());
      });
  return call;
}

grpc::ServerUnaryReactor* PlannerServiceImpl::SimulatePlan(
    grpc::CallbackServerContext* context,
    const v1::SimulatePlanRequest* request,
    v1::SimulatePlanResponse* response) {
  Call* call = new Call(metrics_, RpcMethod::kSimulatePlan);
  std::shared_ptr<const SealedPlan> sealed;
  std::shared_ptr<const RegisteredJob> job;
  const auto read = [&]() -> absl::Status {
    PW_RETURN_IF_ERROR(Admit(*context));
    PW_ASSIGN_OR_RETURN(StepKey key,
                        KeyFromProto(request->has_key(), request->key()));
    const std::pair<const char*, double> factors[] = {
        {"latency_factor", request->latency_factor()},
        {"bandwidth_factor", request->bandwidth_factor()}};
    for (const auto& [field, factor] : factors) {
      // Written so that NaN fails too.
      if (!(factor == 0 ||
            (factor >= 1 / kMaxLinkFactor && factor <= kMaxLinkFactor))) {
        return absl::InvalidArgumentError(
            absl::StrCat(field, ": ", factor, ", must be 0 or 1e-6 .. 1e6"));
      }
    }
    if (!(request->duration_noise() >= 0 && request->duration_noise() <= 1)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "duration_noise: ", request->duration_noise(), ", must be 0 .. 1"));
    }
    if (request->runs() < 0 || request->runs() > kMaxSimulationRuns) {
      return absl::InvalidArgumentError(absl::StrCat(
          "runs: ", request->runs(), ", must be 0 .. ", kMaxSimulationRuns));
    }
    PW_ASSIGN_OR_RETURN(job, core_->CheckKey(key));
    PW_ASSIGN_OR_RETURN(sealed, core_->SealedStep(key));
    return absl::OkStatus();
  };
  if (absl::Status status = read(); !status.ok()) return call->End(status);
  Simulation simulation;
  if (request->latency_factor() != 0) {
    simulation.latency_factor = request->latency_factor();
  }
  if (request->bandwidth_factor() != 0) {
    simulation.bandwidth_factor = request->bandwidth_factor();
  }
  simulation.duration_noise = request->duration_noise();
  simulation.runs = std::max(1, request->runs());
  simulation.seed = request->seed();
  core_->RunTask(job->name, call->cancelled(),
                 [this, call, response, job, sealed,
                  simulation](const absl::Status& status) {
                   if (!status.ok()) {
                     call->End(status);
                     return;
                   }
                   const absl::StatusOr<std::vector<int64_t>> makespans =
                       simulate_(*job->plannable, *sealed->plan, simulation,
                                 *call->cancelled());
                   if (makespans.ok()) {
                     response->mutable_makespan_ns()->Add(makespans->begin(),
                                                          makespans->end());
                   }
                   call->End(makespans.status());
                 });
  return call;
}

}  // namespace pipeweaver::server
