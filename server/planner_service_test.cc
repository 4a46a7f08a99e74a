// The service over real gRPC, with a puppet for a planner: the life of a job,
// and every kind of bad input.

#include "server/planner_service.h"

#include <grpcpp/generic/generic_stub.h>

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "proto/digest/digest.h"
#include "server/testing/test_server.h"

namespace pipeweaver::server {
namespace {

using ::grpc::StatusCode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class PlannerServiceTest : public ::testing::Test {
 protected:
  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (v1::PlannerService::Stub::*method)(
                        grpc::ClientContext*, const Request&, Response*),
                    const Request& request, Response* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() +
                         std::chrono::seconds(30));
    return (server_.stub().*method)(&context, request, response);
  }

  grpc::Status Describe(const std::string& job,
                        v1::DescribeJobResponse* response) {
    v1::DescribeJobRequest request;
    request.set_job(job);
    return Call(&v1::PlannerService::Stub::DescribeJob, request, response);
  }

  grpc::Status GetPlan(const v1::PlanKey& key, v1::Plan* plan) {
    v1::GetPlanRequest request;
    *request.mutable_key() = key;
    v1::GetPlanResponse response;
    const grpc::Status status =
        Call(&v1::PlannerService::Stub::GetPlan, request, &response);
    *plan = response.plan();
    return status;
  }

  static v1::GetProgramRequest ProgramRequest(const v1::PlanKey& key,
                                              uint32_t rank,
                                              uint64_t offset = 0,
                                              uint32_t max_bytes = 0) {
    v1::GetProgramRequest request;
    *request.mutable_key() = key;
    request.set_rank(rank);
    request.set_offset(offset);
    request.set_max_bytes(max_bytes);
    return request;
  }
  grpc::Status GetProgram(const v1::GetProgramRequest& request,
                          v1::GetProgramResponse* response) {
    return Call(&v1::PlannerService::Stub::GetProgram, request, response);
  }

  // The server still answers.
  void ExpectServes() {
    v1::ListJobsResponse response;
    EXPECT_TRUE(Call(&v1::PlannerService::Stub::ListJobs, v1::ListJobsRequest(),
                     &response)
                    .ok());
  }

  TestServer server_;
};

// A forward of SmallJob's transformer layers on `tokens` tokens of one item.
v1::Profile SmallProfile(int64_t tokens, int64_t ns,
                         const std::string& module = "text") {
  v1::Profile profile;
  profile.set_format_version(1);
  profile.set_version(1);
  v1::MeasuredPoint* point = profile.add_points();
  point->mutable_key()->set_kind(v1::POINT_KIND_LAYER);
  v1::LayerKey* layer = point->mutable_key()->mutable_layer();
  layer->set_module(module);
  layer->set_layer("transformer");
  layer->set_pass(v1::LAYER_PASS_FORWARD);
  layer->set_items(1);
  layer->set_tokens(tokens);
  layer->set_sum_squares(tokens * tokens);
  layer->set_max_tokens(tokens);
  point->set_count(1);
  point->set_min_ns(ns);
  point->set_median_ns(ns);
  point->set_max_ns(ns);
  point->set_total_ns(ns);
  return profile;
}

TEST_F(PlannerServiceTest, MeasuredLayersChangeThePlansOfLaterSteps) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  server_.planner().HoldPlans();
  const v1::SubmitStepRequest before = TestServer::Submission("vlm", job, 0, 7);
  ASSERT_TRUE(server_.Submit(before).ok());

  v1::UploadProfileRequest upload;
  upload.set_job("vlm");
  *upload.mutable_profile() = SmallProfile(7, 1000);
  *upload.mutable_profile()->add_points() =
      SmallProfile(7, 1000, "another module").points(0);
  v1::UploadProfileResponse uploaded;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::UploadProfile, upload, &uploaded).ok());
  EXPECT_EQ(uploaded.points_taken(), 1);
  EXPECT_EQ(uploaded.points_left_out(), 1);
  v1::DescribeJobResponse described;
  do {
    ASSERT_TRUE(Describe("vlm", &described).ok());
  } while (described.costs().version() == 0);
  EXPECT_EQ(described.costs().measured_layers(), 1);

  // The step submitted before keeps its costs, however late it is planned, and
  // the same batch submitted after is no batch of a known plan.
  const v1::SubmitStepRequest after = TestServer::Submission("vlm", job, 1, 7);
  ASSERT_TRUE(server_.Submit(after).ok());
  server_.planner().Finish(7);
  server_.planner().Finish(7);
  v1::Plan old_plan;
  v1::Plan new_plan;
  ASSERT_TRUE(GetPlan(before.key(), &old_plan).ok());
  ASSERT_TRUE(GetPlan(after.key(), &new_plan).ok());
  EXPECT_EQ(new_plan.identity().profile_digest(),
            described.costs().profile_digest());
  EXPECT_NE(old_plan.identity().profile_digest(),
            new_plan.identity().profile_digest());
  // All ranks of the earlier step read the plan of the earlier costs.
  for (uint32_t rank = 0; rank < 2; ++rank) {
    v1::GetProgramResponse response;
    ASSERT_TRUE(GetProgram(ProgramRequest(before.key(), rank), &response).ok());
    v1::Program program;
    ASSERT_TRUE(program.ParseFromString(response.data()));
    EXPECT_EQ(program.identity().profile_digest(),
              old_plan.identity().profile_digest());
  }
}

TEST_F(PlannerServiceTest, BadProfilesAreRefused) {
  server_.Register("vlm");
  v1::UploadProfileRequest upload;
  v1::UploadProfileResponse uploaded;
  const auto refused = [&] {
    return Call(&v1::PlannerService::Stub::UploadProfile, upload, &uploaded);
  };
  upload.set_job("t2v");
  *upload.mutable_profile() = SmallProfile(7, 1000);
  EXPECT_EQ(refused().error_code(), StatusCode::NOT_FOUND);
  upload.set_job("vlm");
  upload.mutable_profile()->mutable_points(0)->set_min_ns(2000);
  EXPECT_EQ(refused().error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(refused().error_message(),
              HasSubstr("profile: points[0]: times: must satisfy"));
  const auto refused_layer = [&](const auto& change) {
    *upload.mutable_profile() = SmallProfile(7, 1000);
    change(upload.mutable_profile()
               ->mutable_points(0)
               ->mutable_key()
               ->mutable_layer());
    EXPECT_EQ(refused().error_code(), StatusCode::INVALID_ARGUMENT);
    return refused().error_message();
  };
  EXPECT_THAT(
      refused_layer(
          [](auto* key) { key->set_context_parallel(2'000'000'000); }),
      HasSubstr("profile: points[0]: key.layer.context_parallel: 2000000000, "
                "must be 0 to 1024"));
  EXPECT_THAT(refused_layer([](auto* key) { key->set_tensor_parallel(-1); }),
              HasSubstr("key.layer.tensor_parallel: -1, must be 0 to 1024"));
  EXPECT_THAT(
      refused_layer([](auto* key) { key->set_tokens(int64_t{1} << 60); }),
      HasSubstr("key.layer.tokens: 1152921504606846976, must be 0 to"));
  EXPECT_THAT(
      refused_layer([](auto* key) { key->set_sum_squares(int64_t{1} << 60); }),
      HasSubstr("key.layer.sum_squares"));
  EXPECT_THAT(refused_layer([](auto* key) { key->set_condition_tokens(-5); }),
              HasSubstr("key.layer.condition_tokens: -5, must be 0 to"));
  *upload.mutable_profile() = SmallProfile(7, int64_t{1} << 60);
  EXPECT_THAT(refused().error_message(),
              HasSubstr("max_ns: 1152921504606846976, must be 0 to"));
  for (int i = 0; i < 32768; ++i) upload.mutable_profile()->add_points();
  EXPECT_THAT(refused().error_message(),
              HasSubstr("profile.points: 32769, must be at most 32768"));
  upload.clear_profile();
  EXPECT_THAT(refused().error_message(),
              HasSubstr("profile: format_version: 0, must be 1"));
  v1::DescribeJobResponse described;
  ASSERT_TRUE(Describe("vlm", &described).ok());
  EXPECT_EQ(described.costs().version(), 0);
}

TEST_F(PlannerServiceTest, ReportsCalibrateCostsAndCorrectTheReserve) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  constexpr uint32_t kTokens = 1'000'000;
  v1::DescribeJobResponse described;
  // Forwards take 1.5 times what the puppet's rule says, five layers of them.
  for (uint64_t step = 0; step < 8; ++step) {
    const v1::SubmitStepRequest submit =
        TestServer::Submission("vlm", job, step, kTokens + step);
    ASSERT_TRUE(server_.Submit(submit).ok());
    v1::Plan plan;
    ASSERT_TRUE(GetPlan(submit.key(), &plan).ok());
    v1::ReportStepRequest report;
    *report.mutable_key() = submit.key();
    report.set_plan_digest(plan.plan_digest());
    report.add_start_offset_ns(0);
    report.add_duration_ns(7'500'000);
    report.add_start_offset_ns(7'500'000);
    report.add_duration_ns(10'000'000);
    report.set_step_ns(kTokens * 2);
    report.set_peak_memory_bytes(uint64_t{40} << 20);
    v1::ReportStepResponse reported;
    ASSERT_TRUE(
        Call(&v1::PlannerService::Stub::ReportStep, report, &reported).ok());
  }
  do {
    ASSERT_TRUE(Describe("vlm", &described).ok());
  } while (described.costs().observations() == 0 ||
           described.costs().drifted_steps() < 8);
  // Four layers and a head: only their sum can be known.
  double forward = 0;
  for (const v1::CostFactor& factor : described.costs().factors()) {
    if (factor.pass() != v1::LAYER_PASS_FORWARD) continue;
    const int layers = factor.layer() == v1::LAYER_KIND_TRANSFORMER ? 4 : 1;
    forward += layers * factor.factor();
  }
  EXPECT_NEAR(forward / 5, 1.5, 0.02);
  EXPECT_GT(described.costs().error_before(), 0.1);
  EXPECT_LT(described.costs().error_after(), 0.02);
  // 40 MiB where next to nothing was predicted, in steps of 16 MiB.
  EXPECT_THAT(described.costs().extra_reserve_bytes(),
              ElementsAre(48 << 20, 0));
  v1::ReportStepRequest huge;
  *huge.mutable_key() = TestServer::Submission("vlm", job, 7, 1).key();
  v1::Plan plan;
  ASSERT_TRUE(GetPlan(huge.key(), &plan).ok());
  huge.set_plan_digest(plan.plan_digest());
  huge.set_step_ns(1);
  huge.set_peak_memory_bytes(uint64_t{1} << 51);
  v1::ReportStepResponse reported;
  EXPECT_THAT(
      Call(&v1::PlannerService::Stub::ReportStep, huge, &reported)
          .error_message(),
      HasSubstr("peak_memory_bytes: 2251799813685248, must be at most"));
}

TEST_F(PlannerServiceTest, CostsThatDoNotFitAreNotTakenUp) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  server_.planner().FailPrepare(absl::ResourceExhaustedError("no room"));
  v1::UploadProfileRequest upload;
  upload.set_job("vlm");
  *upload.mutable_profile() = SmallProfile(7, 1000);
  v1::UploadProfileResponse uploaded;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::UploadProfile, upload, &uploaded).ok());
  // One planning thread a job's turn: a step submitted now is planned after.
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 0, 7);
  ASSERT_TRUE(server_.Submit(step).ok());
  v1::Plan plan;
  EXPECT_TRUE(GetPlan(step.key(), &plan).ok());
  v1::DescribeJobResponse described;
  ASSERT_TRUE(Describe("vlm", &described).ok());
  EXPECT_EQ(described.costs().version(), 0);
}

TEST_F(PlannerServiceTest, LongInputDoesNotHideTheError) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 0, 7);
  step.set_layout_digest(std::string(20'000, 'x'));
  const grpc::Status status = server_.Submit(step);
  EXPECT_EQ(status.error_code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("layout_digest"));
  EXPECT_THAT(status.error_message(), HasSubstr("bytes more)"));
}

TEST_F(PlannerServiceTest, TheLifeOfAJob) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  // Above those of any server that was started before.
  EXPECT_GT(job.attempt(), 1'700'000'000u);
  EXPECT_EQ(job.job_digest(), CanonicalDigest(SmallJob("vlm")));
  EXPECT_EQ(job.layout_digest(), CanonicalDigest(job.layout()));
  EXPECT_EQ(job.activation_limit_bytes_size(), 2);

  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  v1::SubmitStepResponse submitted;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::SubmitStep, step, &submitted).ok());
  EXPECT_EQ(submitted.batch_digest(), CanonicalDigest(step.batch()));

  v1::Plan plan;
  ASSERT_TRUE(GetPlan(step.key(), &plan).ok());
  EXPECT_EQ(plan.identity().origin(), v1::PLAN_ORIGIN_SEARCH_FINISHED);
  EXPECT_EQ(plan.identity().batch_digest(), submitted.batch_digest());
  EXPECT_EQ(plan.report().makespan_ns(), 77);
  EXPECT_TRUE(plan.report().certified());
  ASSERT_EQ(plan.program_bytes_size(), 2);

  for (uint32_t rank = 0; rank < 2; ++rank) {
    // In chunks of 7 bytes, and whole.
    std::string bytes;
    while (bytes.size() < plan.program_bytes(rank)) {
      v1::GetProgramResponse chunk;
      ASSERT_TRUE(
          GetProgram(ProgramRequest(step.key(), rank, bytes.size(), 7), &chunk)
              .ok());
      EXPECT_EQ(chunk.total_bytes(), plan.program_bytes(rank));
      EXPECT_LE(chunk.data().size(), 7);
      bytes += chunk.data();
    }
    v1::GetProgramResponse whole;
    ASSERT_TRUE(GetProgram(ProgramRequest(step.key(), rank), &whole).ok());
    EXPECT_EQ(whole.data(), bytes);
    v1::Program program;
    ASSERT_TRUE(program.ParseFromString(bytes));
    EXPECT_EQ(program.rank(), rank);
    EXPECT_EQ(program.plan_digest(), plan.plan_digest());
    EXPECT_TRUE(VerifyProgramDigests(program).ok());
  }

  v1::ReportStepRequest report;
  *report.mutable_key() = step.key();
  report.set_plan_digest(plan.plan_digest());
  report.add_start_offset_ns(0);
  report.add_start_offset_ns(80);
  report.add_duration_ns(80);
  report.add_duration_ns(74);
  report.set_step_ns(154);
  v1::ReportStepResponse reported;
  EXPECT_TRUE(
      Call(&v1::PlannerService::Stub::ReportStep, report, &reported).ok());

  v1::DescribeJobResponse described;
  ASSERT_TRUE(Describe("vlm", &described).ok());
  EXPECT_EQ(described.job().ShortDebugString(),
            SmallJob("vlm").ShortDebugString());
  EXPECT_TRUE(described.layout_confirmed());
  EXPECT_EQ(described.steps_held(), 1);
  EXPECT_THAT(described.plans_by_origin(), ElementsAre(0, 1, 0, 0, 0));
  EXPECT_EQ(described.reports(), 1);
  EXPECT_DOUBLE_EQ(described.measured_over_predicted(), 2);

  v1::CompareStrategiesRequest compare;
  compare.set_job("vlm");
  *compare.mutable_batch() = SmallBatch(5);
  v1::CompareStrategiesResponse compared;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::CompareStrategies, compare, &compared)
          .ok());
  ASSERT_EQ(compared.outcomes_size(), 3);
  EXPECT_EQ(compared.outcomes(0).strategy(), "planner");
  EXPECT_EQ(compared.outcomes(1).strategy(), "1f1b");
  EXPECT_EQ(compared.outcomes(1).report().makespan_ns(), 5);

  v1::SimulatePlanRequest simulate;
  *simulate.mutable_key() = step.key();
  simulate.set_runs(3);
  v1::SimulatePlanResponse simulated;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::SimulatePlan, simulate, &simulated).ok());
  EXPECT_THAT(simulated.makespan_ns(), ElementsAre(77, 77, 77));

  v1::RemoveJobRequest remove;
  remove.set_job("vlm");
  v1::RemoveJobResponse removed;
  EXPECT_TRUE(
      Call(&v1::PlannerService::Stub::RemoveJob, remove, &removed).ok());
  EXPECT_EQ(
      Call(&v1::PlannerService::Stub::RemoveJob, remove, &removed).error_code(),
      StatusCode::NOT_FOUND);
  EXPECT_EQ(GetPlan(step.key(), &plan).error_code(), StatusCode::NOT_FOUND);
}

TEST_F(PlannerServiceTest, APinnedLayoutNeedsNoConfirmation) {
  v1::RegisterJobRequest request;
  request.set_request_id("start");
  *request.mutable_job() = SmallJob("vlm");
  v1::ModuleLayout* module =
      request.mutable_job()->mutable_layout()->add_modules();
  module->set_module("text");
  module->set_sub_microbatch_tokens(128);
  v1::PipelineSegment* segment = module->add_segments();
  for (int rank = 0; rank < 2; ++rank) {
    v1::Chunk* chunk = segment->add_chunks();
    chunk->set_rank(rank);
    chunk->set_first_layer(rank * 2);
    chunk->set_num_layers(rank == 0 ? 2 : 3);
  }
  v1::RegisterJobResponse response;
  const grpc::Status status =
      Call(&v1::PlannerService::Stub::RegisterJob, request, &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_TRUE(response.layout_confirmed());
  EXPECT_EQ(response.layout_digest(), CanonicalDigest(request.job().layout()));
  // The job's digest leaves the layout out.
  EXPECT_EQ(response.job_digest(), CanonicalDigest(SmallJob("vlm")));
}

struct BadRegistration {
  const char* name;
  std::function<void(v1::RegisterJobRequest*)> spoil;
  StatusCode code;
  const char* message;
};

class BadRegistrationTest
    : public PlannerServiceTest,
      public ::testing::WithParamInterface<BadRegistration> {};

TEST_P(BadRegistrationTest, IsRefusedAndLeavesNothing) {
  v1::RegisterJobRequest request;
  request.set_request_id("start");
  *request.mutable_job() = SmallJob("vlm");
  GetParam().spoil(&request);
  v1::RegisterJobResponse response;
  const grpc::Status status =
      Call(&v1::PlannerService::Stub::RegisterJob, request, &response);
  EXPECT_EQ(status.error_code(), GetParam().code) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr(GetParam().message));
  v1::ListJobsResponse jobs;
  EXPECT_TRUE(
      Call(&v1::PlannerService::Stub::ListJobs, v1::ListJobsRequest(), &jobs)
          .ok());
  EXPECT_EQ(jobs.jobs_size(), 0);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, BadRegistrationTest,
    ::testing::Values(
        BadRegistration{
            "NoRequestId",
            [](v1::RegisterJobRequest* r) { r->clear_request_id(); },
            StatusCode::INVALID_ARGUMENT, "request_id: 0"},
        BadRegistration{"LongRequestId",
                        [](v1::RegisterJobRequest* r) {
                          r->set_request_id(std::string(64, 'x'));
                        },
                        StatusCode::INVALID_ARGUMENT, "request_id: 64"},
        BadRegistration{"NoJob",
                        [](v1::RegisterJobRequest* r) { r->clear_job(); },
                        StatusCode::INVALID_ARGUMENT, "job: missing"},
        BadRegistration{"BadName",
                        [](v1::RegisterJobRequest* r) {
                          r->mutable_job()->set_name("a b");
                        },
                        StatusCode::INVALID_ARGUMENT, "name"},
        BadRegistration{"NegativeSize",
                        [](v1::RegisterJobRequest* r) {
                          r->mutable_job()
                              ->mutable_modules(0)
                              ->mutable_layers(0)
                              ->set_hidden_size(-64);
                        },
                        StatusCode::INVALID_ARGUMENT, "hidden_size"},
        BadRegistration{"OverflowingSize",
                        [](v1::RegisterJobRequest* r) {
                          r->mutable_job()
                              ->mutable_modules(0)
                              ->mutable_layers(0)
                              ->set_ffn_size(int64_t{1} << 62);
                        },
                        StatusCode::INVALID_ARGUMENT, "ffn_size"},
        BadRegistration{
            "NoRanks",
            [](v1::RegisterJobRequest* r) {
              r->mutable_job()->mutable_parallelism()->set_pipeline_parallel(0);
            },
            StatusCode::INVALID_ARGUMENT, "pipeline_parallel"},
        BadRegistration{"Circle",
                        [](v1::RegisterJobRequest* r) {
                          v1::Job* job = r->mutable_job();
                          *job->add_modules() = job->modules(0);
                          job->mutable_modules(1)->set_name("other");
                          for (int i = 0; i < 2; ++i) {
                            v1::ModuleEdge* edge = job->add_edges();
                            edge->set_producer(job->modules(i).name());
                            edge->set_consumer(job->modules(1 - i).name());
                          }
                        },
                        StatusCode::INVALID_ARGUMENT, "edges"},
        BadRegistration{"ModuleThatNothingFeeds",
                        [](v1::RegisterJobRequest* r) {
                          v1::Job* job = r->mutable_job();
                          *job->add_modules() = job->modules(0);
                          job->mutable_modules(1)->set_name("projector");
                          job->mutable_modules(1)->clear_modality();
                        },
                        StatusCode::INVALID_ARGUMENT, "modules"},
        BadRegistration{"LayoutOnRankOutOfRange",
                        [](v1::RegisterJobRequest* r) {
                          v1::ModuleLayout* module =
                              r->mutable_job()->mutable_layout()->add_modules();
                          module->set_module("text");
                          module->set_sub_microbatch_tokens(1);
                          v1::Chunk* chunk =
                              module->add_segments()->add_chunks();
                          chunk->set_rank(2);
                          chunk->set_num_layers(5);
                        },
                        StatusCode::INVALID_ARGUMENT, "rank"},
        BadRegistration{"TooManySamples",
                        [](v1::RegisterJobRequest* r) {
                          for (int i = 0; i < 9; ++i) {
                            *r->add_sample_batches() = SmallBatch(1);
                          }
                        },
                        StatusCode::INVALID_ARGUMENT, "sample_batches: 9"},
        BadRegistration{"ForwardOnlySample",
                        [](v1::RegisterJobRequest* r) {
                          *r->add_sample_batches() = SmallBatch(1);
                          r->mutable_sample_batches(0)->set_forward_only(true);
                        },
                        StatusCode::INVALID_ARGUMENT,
                        "sample_batches[0].forward_only is true"},
        BadRegistration{"BadSample",
                        [](v1::RegisterJobRequest* r) {
                          *r->add_sample_batches() = SmallBatch(1);
                          r->add_sample_batches();
                        },
                        StatusCode::INVALID_ARGUMENT,
                        "sample_batches[1]: number of microbatches is 0"}),
    [](const auto& info) { return info.param.name; });

TEST_F(PlannerServiceTest, ARegisteredNameWithAnotherJobIsRefused) {
  server_.Register("vlm");
  v1::RegisterJobRequest request;
  request.set_request_id("other");
  *request.mutable_job() = SmallJob("vlm", 4);
  v1::RegisterJobResponse response;
  const grpc::Status status =
      Call(&v1::PlannerService::Stub::RegisterJob, request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::ALREADY_EXISTS);
  EXPECT_THAT(status.error_message(), HasSubstr("job.name: 'vlm'"));
}

TEST_F(PlannerServiceTest, AJobThatDoesNotFitSaysWhy) {
  server_.planner().FailPrepare(
      absl::ResourceExhaustedError("rank 1: 90 bytes, the limit is 80"));
  v1::RegisterJobRequest request;
  request.set_request_id("start");
  *request.mutable_job() = SmallJob("vlm");
  v1::RegisterJobResponse response;
  const grpc::Status status =
      Call(&v1::PlannerService::Stub::RegisterJob, request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("rank 1: 90 bytes"));
}

// Of those that wait behind others, which go on.
TEST_F(PlannerServiceTest, CallersThatHaveGoneLeaveTheirPlacesToOthers) {
  server_.planner().HoldPrepares();
  const auto start = [this](int number, grpc::ClientContext* context) {
    return std::async(std::launch::async, [this, number, context] {
      v1::RegisterJobRequest request;
      request.set_request_id("run");
      *request.mutable_job() = SmallJob("job-" + std::to_string(number));
      v1::RegisterJobResponse response;
      return server_.stub()
          .RegisterJob(context, request, &response)
          .error_code();
    });
  };
  grpc::ClientContext running[2];
  std::future<StatusCode> run[] = {start(0, &running[0]),
                                   start(1, &running[1])};
  server_.planner().WaitForPrepares(2);
  const auto wait_a_little = [&](int number) {
    auto context = std::make_unique<grpc::ClientContext>();
    context->set_deadline(std::chrono::system_clock::now() +
                          std::chrono::milliseconds(300));
    std::future<StatusCode> answer = start(number, context.get());
    return std::pair(std::move(context), std::move(answer));
  };
  std::vector<
      std::pair<std::unique_ptr<grpc::ClientContext>, std::future<StatusCode>>>
      gone;
  for (int i = 2; i < 18; ++i) gone.push_back(wait_a_little(i));
  for (auto& call : gone) {
    EXPECT_EQ(call.second.get(), StatusCode::DEADLINE_EXCEEDED);
  }
  // The server learns that they have gone a little after they know.
  StatusCode last = StatusCode::RESOURCE_EXHAUSTED;
  for (int i = 0; i < 100 && last == StatusCode::RESOURCE_EXHAUSTED; ++i) {
    if (i > 0) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    auto call = wait_a_little(18);
    last = call.second.get();
  }
  EXPECT_EQ(last, StatusCode::DEADLINE_EXCEEDED)
      << "it waits, instead of being refused";
  for (int i = 0; i < 2; ++i) {
    running[i].TryCancel();
    EXPECT_EQ(run[i].get(), StatusCode::CANCELLED);
  }
}

TEST_F(PlannerServiceTest, ARunGoesOnWithItsAttempt) {
  v1::RegisterJobRequest request;
  request.set_request_id("run");
  request.set_attempt(7);
  *request.mutable_job() = SmallJob("vlm");
  v1::RegisterJobResponse response;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::RegisterJob, request, &response).ok());
  EXPECT_EQ(response.attempt(), 7);
  request.set_request_id("older run");
  request.set_attempt(6);
  grpc::Status status =
      Call(&v1::PlannerService::Stub::RegisterJob, request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::ABORTED);
  EXPECT_THAT(status.error_message(), HasSubstr("the latest is 7"));
  request.set_attempt(uint64_t{1} << 40);
  status = Call(&v1::PlannerService::Stub::RegisterJob, request, &response);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(),
              HasSubstr("attempt: 1099511627776, must be below 2^40"));
}

TEST_F(PlannerServiceTest, AWrongLayoutDigestIsNotConfirmed) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  v1::ConfirmLayoutRequest request;
  request.set_job("vlm");
  request.set_attempt(job.attempt());
  request.set_layout_digest("wrong");
  v1::ConfirmLayoutResponse response;
  EXPECT_EQ(Call(&v1::PlannerService::Stub::ConfirmLayout, request, &response)
                .error_code(),
            StatusCode::FAILED_PRECONDITION);
}

struct BadSubmission {
  const char* name;
  std::function<void(v1::SubmitStepRequest*)> spoil;
  StatusCode code;
  const char* message;
};

class BadSubmissionTest : public PlannerServiceTest,
                          public ::testing::WithParamInterface<BadSubmission> {
};

TEST_P(BadSubmissionTest, IsRefusedAndLeavesNothing) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  v1::SubmitStepRequest request = TestServer::Submission("vlm", job, 3, 77);
  GetParam().spoil(&request);
  const grpc::Status status = server_.Submit(request);
  EXPECT_EQ(status.error_code(), GetParam().code) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr(GetParam().message));
  v1::DescribeJobResponse described;
  ASSERT_TRUE(Describe("vlm", &described).ok());
  EXPECT_EQ(described.steps_held(), 0);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, BadSubmissionTest,
    ::testing::Values(
        BadSubmission{"NoKey", [](v1::SubmitStepRequest* r) { r->clear_key(); },
                      StatusCode::INVALID_ARGUMENT, "key: missing"},
        BadSubmission{
            "UnknownJob",
            [](v1::SubmitStepRequest* r) { r->mutable_key()->set_job("t2v"); },
            StatusCode::NOT_FOUND, "job: 't2v' is not registered"},
        BadSubmission{
            "OldAttempt",
            [](v1::SubmitStepRequest* r) { r->mutable_key()->set_attempt(0); },
            StatusCode::ABORTED, "attempt: 0"},
        BadSubmission{"UnknownAttempt",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_key()->set_attempt(r->key().attempt() + 1);
                      },
                      StatusCode::NOT_FOUND,
                      "' was not handed out, the latest is "},
        BadSubmission{"StepOutOfRange",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_key()->set_step(uint64_t{1} << 62);
                      },
                      StatusCode::INVALID_ARGUMENT,
                      "key.step: 4611686018427387904, must be below 2^62"},
        BadSubmission{
            "ReplicaOutOfRange",
            [](v1::SubmitStepRequest* r) { r->mutable_key()->set_replica(1); },
            StatusCode::INVALID_ARGUMENT, "key.replica: 1"},
        BadSubmission{
            "WrongLayout",
            [](v1::SubmitStepRequest* r) { r->set_layout_digest("wrong"); },
            StatusCode::FAILED_PRECONDITION, "layout_digest"},
        BadSubmission{"NoBatch",
                      [](v1::SubmitStepRequest* r) { r->clear_batch(); },
                      StatusCode::INVALID_ARGUMENT, "batch: missing"},
        BadSubmission{"NoMicrobatches",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_batch()->clear_microbatches();
                      },
                      StatusCode::INVALID_ARGUMENT, "microbatches"},
        BadSubmission{
            "NoItems",
            [](v1::SubmitStepRequest* r) {
              r->mutable_batch()->mutable_microbatches(0)->clear_items();
            },
            StatusCode::INVALID_ARGUMENT, "item"},
        BadSubmission{"ZeroTokens",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_batch()
                            ->mutable_microbatches(0)
                            ->mutable_items(0)
                            ->set_tokens(0, 0);
                      },
                      StatusCode::INVALID_ARGUMENT, "tokens"},
        BadSubmission{"ModuleOutOfRange",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_batch()
                            ->mutable_microbatches(0)
                            ->mutable_items(0)
                            ->set_module(9);
                      },
                      StatusCode::INVALID_ARGUMENT, "module"},
        BadSubmission{"NegativeNeededIn",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_needed_in()->set_seconds(-1);
                      },
                      StatusCode::INVALID_ARGUMENT, "needed_in.seconds: -1"},
        BadSubmission{"OverflowingNeededIn",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_needed_in()->set_seconds(int64_t{1} << 62);
                      },
                      StatusCode::INVALID_ARGUMENT, "must be 0 .. 86400"},
        BadSubmission{"LongJointWait",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_joint_wait()->set_seconds(601);
                      },
                      StatusCode::INVALID_ARGUMENT,
                      "joint_wait.seconds: 601, must be 0 .. 600"},
        BadSubmission{
            "NoisierThanItself",
            [](v1::SubmitStepRequest* r) { r->set_duration_noise(1.5); },
            StatusCode::INVALID_ARGUMENT, "duration_noise: 1.5"},
        BadSubmission{"JointAndNoise",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_joint_wait()->set_seconds(1);
                        r->set_duration_noise(0.05);
                      },
                      StatusCode::INVALID_ARGUMENT, "duration_noise: 0.05"},
        BadSubmission{
            "MovesWithoutJointWait",
            [](v1::SubmitStepRequest* r) { r->set_move_microbatches(true); },
            StatusCode::INVALID_ARGUMENT,
            "move_microbatches: true, must be false where joint_wait is not "
            "set"},
        BadSubmission{"MovesWithoutOtherReplicas",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_joint_wait()->set_seconds(1);
                        r->set_move_microbatches(true);
                      },
                      StatusCode::INVALID_ARGUMENT,
                      "move_microbatches: true, must be false where "
                      "parallelism.data_parallel of job 'vlm' is 1"},
        BadSubmission{"BadNanos",
                      [](v1::SubmitStepRequest* r) {
                        r->mutable_needed_in()->set_nanos(-5);
                      },
                      StatusCode::INVALID_ARGUMENT, "needed_in.nanos: -5"},
        BadSubmission{
            "NegativeBudget",
            [](v1::SubmitStepRequest* r) { r->set_budget_evaluations(-1); },
            StatusCode::INVALID_ARGUMENT, "budget_evaluations: -1"}),
    [](const auto& info) { return info.param.name; });

TEST_F(PlannerServiceTest, AStepSubmittedTwice) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  EXPECT_TRUE(server_.Submit(step).ok());
  EXPECT_TRUE(server_.Submit(step).ok());
  const grpc::Status unlike =
      server_.Submit(TestServer::Submission("vlm", job, 3, 78));
  EXPECT_EQ(unlike.error_code(), StatusCode::ALREADY_EXISTS);
  EXPECT_THAT(unlike.error_message(), HasSubstr("batch: job 'vlm'"));
}

TEST_F(PlannerServiceTest, ReplicasThatWaitForEachOtherArePlannedTogether) {
  v1::RegisterJobRequest registration;
  registration.set_request_id("two replicas");
  *registration.mutable_job() = SmallJob("pair");
  registration.mutable_job()->mutable_parallelism()->set_data_parallel(2);
  v1::RegisterJobResponse job;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::RegisterJob, registration, &job).ok());
  v1::ConfirmLayoutRequest confirm;
  confirm.set_job("pair");
  confirm.set_attempt(job.attempt());
  confirm.set_layout_digest(job.layout_digest());
  v1::ConfirmLayoutResponse confirmed;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::ConfirmLayout, confirm, &confirmed).ok());

  std::string digests;
  v1::PlanKey keys[2];
  for (const uint32_t replica : {0, 1}) {
    v1::SubmitStepRequest step =
        TestServer::Submission("pair", job, 5, 70 + replica);
    step.mutable_key()->set_replica(replica);
    step.mutable_joint_wait()->set_seconds(600);
    keys[replica] = step.key();
    v1::SubmitStepResponse submitted;
    ASSERT_TRUE(
        Call(&v1::PlannerService::Stub::SubmitStep, step, &submitted).ok());
    digests += submitted.batch_digest();
  }
  for (const v1::PlanKey& key : keys) {
    v1::Plan plan;
    ASSERT_TRUE(GetPlan(key, &plan).ok());
    EXPECT_EQ(plan.identity().joint_digest(), Sha256(digests));
    EXPECT_EQ(plan.report().makespan_ns(), 70 + key.replica());
    v1::GetProgramResponse whole;
    ASSERT_TRUE(GetProgram(ProgramRequest(key, 1), &whole).ok());
    v1::Program program;
    ASSERT_TRUE(program.ParseFromString(whole.data()));
    EXPECT_TRUE(VerifyProgramDigests(program).ok());
  }
}

TEST_F(PlannerServiceTest, MovesNeedAnExecutorThatFeedsThem) {
  v1::RegisterJobRequest registration;
  registration.set_request_id("two replicas");
  *registration.mutable_job() = SmallJob("pair");
  registration.mutable_job()->mutable_parallelism()->set_data_parallel(2);
  v1::RegisterJobResponse job;
  ASSERT_TRUE(
      Call(&v1::PlannerService::Stub::RegisterJob, registration, &job).ok());
  v1::SubmitStepRequest step = TestServer::Submission("pair", job, 5, 70);
  step.mutable_joint_wait()->set_seconds(600);
  step.set_move_microbatches(true);
  const grpc::Status status = server_.Submit(step);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(),
              HasSubstr("move_microbatches: true, must be false where "
                        "executor.moved_microbatches of job 'pair' is not "
                        "set"));
}

TEST_F(PlannerServiceTest, AnOldAttemptIsAborted) {
  const v1::RegisterJobResponse first = server_.Register("vlm", "first");
  EXPECT_TRUE(server_.Submit(TestServer::Submission("vlm", first, 3, 77)).ok());
  const v1::RegisterJobResponse second = server_.Register("vlm", "second");
  EXPECT_EQ(second.attempt(), first.attempt() + 1);
  const v1::SubmitStepRequest old = TestServer::Submission("vlm", first, 4, 77);
  EXPECT_EQ(server_.Submit(old).error_code(), StatusCode::ABORTED);
  v1::Plan plan;
  EXPECT_EQ(GetPlan(old.key(), &plan).error_code(), StatusCode::ABORTED);
  // Steps may go back under the new one.
  EXPECT_TRUE(
      server_.Submit(TestServer::Submission("vlm", second, 0, 77)).ok());
}

TEST_F(PlannerServiceTest, BadReads) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  ASSERT_TRUE(server_.Submit(step).ok());
  v1::GetProgramResponse response;
  grpc::Status status = GetProgram(ProgramRequest(step.key(), 2), &response);
  EXPECT_EQ(status.error_code(), StatusCode::OUT_OF_RANGE);
  EXPECT_THAT(status.error_message(), HasSubstr("rank: 2"));
  status = GetProgram(ProgramRequest(step.key(), 0, 1 << 30), &response);
  EXPECT_EQ(status.error_code(), StatusCode::OUT_OF_RANGE);
  EXPECT_THAT(status.error_message(), HasSubstr("offset: 1073741824"));
  v1::PlanKey later = step.key();
  later.set_step(4);
  status = GetProgram(ProgramRequest(later, 0), &response);
  EXPECT_EQ(status.error_code(), StatusCode::NOT_FOUND);
  EXPECT_THAT(status.error_message(), HasSubstr("was not submitted"));
  status = GetProgram(v1::GetProgramRequest(), &response);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("key: missing"));
  v1::Plan plan;
  EXPECT_EQ(GetPlan(v1::PlanKey(), &plan).error_code(),
            StatusCode::INVALID_ARGUMENT);
}

TEST_F(PlannerServiceTest, AShadowStepIsPlannedButNotRead) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  step.set_shadow(true);
  ASSERT_TRUE(server_.Submit(step).ok());
  v1::Plan plan;
  EXPECT_TRUE(GetPlan(step.key(), &plan).ok());
  v1::GetProgramResponse response;
  const grpc::Status status =
      GetProgram(ProgramRequest(step.key(), 0), &response);
  EXPECT_EQ(status.error_code(), StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(status.error_message(), HasSubstr("shadow"));
}

TEST_F(PlannerServiceTest, ABatchTooBigForMemorySaysSoWhenRead) {
  server_.planner().HoldPlans();
  server_.planner().FailSafe(absl::ResourceExhaustedError("safe: too big"));
  server_.planner().Fail(77, absl::ResourceExhaustedError("rank 0: too big"));
  const v1::RegisterJobResponse job = server_.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  ASSERT_TRUE(server_.Submit(step).ok());
  v1::Plan plan;
  const grpc::Status status = GetPlan(step.key(), &plan);
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(status.error_message(), HasSubstr("rank 0: too big"));
}

TEST_F(PlannerServiceTest, StepsAreWithdrawnUntilTheyAreSealed) {
  server_.planner().HoldPlans();
  const v1::RegisterJobResponse job = server_.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  ASSERT_TRUE(server_.Submit(step).ok());
  v1::CancelStepRequest request;
  *request.mutable_key() = step.key();
  v1::CancelStepResponse response;
  EXPECT_TRUE(
      Call(&v1::PlannerService::Stub::CancelStep, request, &response).ok());
  EXPECT_EQ(Call(&v1::PlannerService::Stub::CancelStep, request, &response)
                .error_code(),
            StatusCode::NOT_FOUND);
  // Another batch may take the key now.
  ASSERT_TRUE(server_.Submit(TestServer::Submission("vlm", job, 3, 78)).ok());
  server_.planner().Finish(78);
  v1::Plan plan;
  ASSERT_TRUE(GetPlan(step.key(), &plan).ok());
  EXPECT_EQ(Call(&v1::PlannerService::Stub::CancelStep, request, &response)
                .error_code(),
            StatusCode::FAILED_PRECONDITION);
}

TEST_F(PlannerServiceTest, AClientThatVanishesTakesNothingAlong) {
  server_.planner().HoldPlans();
  const v1::RegisterJobResponse job = server_.Register("vlm");
  const v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  ASSERT_TRUE(server_.Submit(step).ok());
  server_.planner().WaitForPlans(1);

  grpc::ClientContext vanishing;
  auto vanished = std::async(std::launch::async, [&] {
    v1::GetProgramResponse response;
    return server_.stub().GetProgram(&vanishing, ProgramRequest(step.key(), 0),
                                     &response);
  });
  grpc::ClientContext short_lived;
  short_lived.set_deadline(std::chrono::system_clock::now() +
                           std::chrono::milliseconds(50));
  v1::GetProgramResponse response;
  EXPECT_EQ(
      server_.stub()
          .GetProgram(&short_lived, ProgramRequest(step.key(), 0), &response)
          .error_code(),
      StatusCode::DEADLINE_EXCEEDED);
  vanishing.TryCancel();
  EXPECT_EQ(vanished.get().error_code(), StatusCode::CANCELLED);

  auto patient = std::async(std::launch::async, [&] {
    v1::GetProgramResponse program;
    return GetProgram(ProgramRequest(step.key(), 1), &program);
  });
  server_.planner().Finish(77);
  EXPECT_TRUE(patient.get().ok());
}

// Baselines look at no deadline, only at whether they are cancelled.
TEST_F(PlannerServiceTest, AComparisonIsCancelledAtItsDeadline) {
  server_.Register("vlm");
  server_.planner().HoldPlans();
  v1::CompareStrategiesRequest compare;
  compare.set_job("vlm");
  compare.add_strategies("1f1b");
  *compare.mutable_batch() = SmallBatch(5);
  v1::CompareStrategiesResponse compared;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::milliseconds(300));
  EXPECT_EQ(server_.stub()
                .CompareStrategies(&context, compare, &compared)
                .error_code(),
            StatusCode::DEADLINE_EXCEEDED);
  // Nothing of it is left in the way of the next one.
  *compare.mutable_batch() = SmallBatch(6);
  server_.planner().Finish(6);
  server_.planner().Finish(6);
  EXPECT_TRUE(
      Call(&v1::PlannerService::Stub::CompareStrategies, compare, &compared)
          .ok());
}

TEST_F(PlannerServiceTest, BadQuestions) {
  const v1::RegisterJobResponse job = server_.Register("vlm");
  v1::CompareStrategiesRequest compare;
  compare.set_job("vlm");
  *compare.mutable_batch() = SmallBatch(5);
  compare.add_strategies("magic");
  v1::CompareStrategiesResponse compared;
  grpc::Status status =
      Call(&v1::PlannerService::Stub::CompareStrategies, compare, &compared);
  EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("strategies: 'magic'"));
  compare.set_strategies(0, "1f1b");
  compare.add_strategies("1f1b");
  status =
      Call(&v1::PlannerService::Stub::CompareStrategies, compare, &compared);
  EXPECT_THAT(status.error_message(), HasSubstr("listed twice"));

  v1::SimulatePlanRequest simulate;
  *simulate.mutable_key() = TestServer::Submission("vlm", job, 3, 7).key();
  v1::SimulatePlanResponse simulated;
  simulate.set_duration_noise(1.5);
  status = Call(&v1::PlannerService::Stub::SimulatePlan, simulate, &simulated);
  EXPECT_THAT(status.error_message(), HasSubstr("duration_noise: 1.5"));
  simulate.set_duration_noise(0);
  simulate.set_runs(1001);
  status = Call(&v1::PlannerService::Stub::SimulatePlan, simulate, &simulated);
  EXPECT_THAT(status.error_message(), HasSubstr("runs: 1001"));
  simulate.set_runs(1);
  simulate.set_latency_factor(-1);
  status = Call(&v1::PlannerService::Stub::SimulatePlan, simulate, &simulated);
  EXPECT_THAT(status.error_message(), HasSubstr("latency_factor: -1"));
  simulate.set_latency_factor(1);
  EXPECT_EQ(Call(&v1::PlannerService::Stub::SimulatePlan, simulate, &simulated)
                .error_code(),
            StatusCode::NOT_FOUND);
}

TEST(PlannerServiceLimitsTest, AGiantMessageIsRefused) {
  v1::ServerConfig config;
  config.set_max_message_bytes(10'000);
  TestServer server(config);
  const v1::RegisterJobResponse job = server.Register("vlm");
  v1::SubmitStepRequest step = TestServer::Submission("vlm", job, 3, 77);
  for (int i = 0; i < 10'000; ++i) {
    step.mutable_batch()->mutable_microbatches(0)->mutable_items(0)->add_tokens(
        1000);
  }
  const grpc::Status status = server.Submit(step);
  EXPECT_EQ(status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(server.Submit(TestServer::Submission("vlm", job, 3, 77)).ok());
}

// Calls `method` with bytes that mean nothing.
grpc::Status CallRaw(grpc::GenericStub& stub, const std::string& method,
                     const std::string& bytes) {
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() +
                       std::chrono::seconds(30));
  std::promise<grpc::Status> done;
  stub.UnaryCall(
      &context, method, grpc::StubOptions(), &request, &response,
      [&done](const grpc::Status& status) { done.set_value(status); });
  return done.get_future().get();
}

TEST_F(PlannerServiceTest, GarbageBytesAreRefused) {
  grpc::GenericStub stub(server_.channel());
  for (const char* method : {"SubmitStep", "GetProgram", "RegisterJob"}) {
    const grpc::Status status =
        CallRaw(stub, std::string("/pipeweaver.v1.PlannerService/") + method,
                "\xff\xff\xff garbage");
    EXPECT_EQ(status.error_code(), StatusCode::INVALID_ARGUMENT) << method;
    EXPECT_THAT(status.error_message(),
                HasSubstr(std::string("not a pipeweaver.v1.") + method));
  }
  EXPECT_EQ(CallRaw(stub, "/pipeweaver.v1.PlannerService/NoSuchMethod", "x")
                .error_code(),
            StatusCode::UNIMPLEMENTED);
  ExpectServes();
}

}  // namespace
}  // namespace pipeweaver::server
