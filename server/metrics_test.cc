#include "server/metrics.h"

#include <prometheus/text_serializer.h>
#include <stdio.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::server {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

std::string Page(const Metrics& metrics) {
  return prometheus::TextSerializer().Serialize(metrics.Collect());
}

SealedPlan MakePlan(const std::string& job) {
  auto plan = std::make_shared<search::StepPlan>();
  plan->report.strategy = "portfolio";
  plan->report.makespan_ns = 2'000'000'000;
  plan->report.schedule_makespan_ns = 1'500;
  plan->report.lower_bound_ns = 1'000;
  SealedPlan sealed;
  sealed.identity.key.job = job;
  sealed.identity.origin = PlanOrigin::kSafe;
  sealed.plan = plan;
  return sealed;
}

// Each kind of event once.
void Exercise(Metrics& metrics) {
  metrics.SetSources([] { return Metrics::Levels{1, 2, 3, 4, 5, 6, 7, 8, 9}; },
                     [](const std::string&) { return 7; });
  metrics.OnJobRegistered("vlm", 1);
  metrics.OnPlanSealed(MakePlan("vlm"), {1'000, 2'000});
  metrics.OnStepFailed({"vlm", 1, 0, 0}, absl::ResourceExhaustedError("full"));
  metrics.OnPlanGaveWay({"vlm", 1, 0, 0});
  metrics.OnReport("vlm", 1.25);
  CostVersion version;
  version.number = 3;
  version.measured_layers = 8;
  version.calibration.error_before = 0.25;
  version.calibration.error_after = 0.125;
  version.extra_reserve_bytes = {0, 64};
  metrics.OnCosts("vlm", version, /*is_new=*/true);
  metrics.OnCostsRefused("vlm", absl::ResourceExhaustedError("full"));
  metrics.OnDrift({"vlm", 1, 0, 0},
                  {semu::Drift{0, 100, 150, 0.5, 0.03}, true, 1});
  metrics.OnLikeBatchLookup(true);
  metrics.CountRpc(RpcMethod::kGetProgram, absl::StatusCode::kNotFound,
                   std::chrono::microseconds(3));
}

TEST(MetricsTest, CountsWhatHappens) {
  Metrics metrics(10);
  Exercise(metrics);
  const std::string page = Page(metrics);
  for (const char* line :
       {"pipeweaver_build_info{version=\"0.1.0\"} 1",
        "pipeweaver_jobs 1",
        "pipeweaver_queue_length 2",
        "pipeweaver_planning_threads_busy 3",
        "pipeweaver_registrations_waiting 6",
        "pipeweaver_registrations_running 7",
        "pipeweaver_questions_waiting 8",
        "pipeweaver_questions_running 9",
        "pipeweaver_steps_held 4",
        "pipeweaver_plan_bytes 5",
        "pipeweaver_plans_sealed_total{origin=\"safe\"} 1",
        "pipeweaver_steps_failed_total{code=\"RESOURCE_EXHAUSTED\"} 1",
        "pipeweaver_plans_gave_way_total 1",
        "pipeweaver_gap_ratio_sum 0.5",
        "pipeweaver_predicted_step_seconds_sum 2",
        "pipeweaver_cost_versions_total 1",
        "pipeweaver_cost_versions_refused_total 1",
        "pipeweaver_drifted_steps_total 1",
        "pipeweaver_job_cost_version{job=\"vlm\"} 3",
        "pipeweaver_job_measured_layers{job=\"vlm\"} 8",
        "pipeweaver_job_stage_error_before_ratio{job=\"vlm\"} 0.25",
        "pipeweaver_job_stage_error_after_ratio{job=\"vlm\"} 0.125",
        "pipeweaver_job_extra_reserve_bytes{job=\"vlm\"} 64",
        "pipeweaver_job_drift{job=\"vlm\"} 1",
        "pipeweaver_plan_cache_hits_total 1",
        "pipeweaver_rpc_seconds_count{method=\"GetProgram\"} 1",
        "pipeweaver_job_steps_held{job=\"vlm\"} 7",
        "pipeweaver_job_gap_ratio{job=\"vlm\"} 0.5",
        "pipeweaver_job_measured_over_predicted_ratio{job=\"vlm\"} 1.25"}) {
    EXPECT_THAT(page, HasSubstr(line));
  }
}

TEST(MetricsTest, DriftEndsWithAStepAsPredicted) {
  Metrics metrics(1);
  Exercise(metrics);
  metrics.OnDrift({"vlm", 1, 1, 0}, {std::nullopt, true, 0});
  EXPECT_THAT(Page(metrics), HasSubstr("pipeweaver_job_drift{job=\"vlm\"} 0"));
  EXPECT_THAT(Page(metrics), HasSubstr("pipeweaver_drifted_steps_total 1"));
}

TEST(MetricsTest, JobLabelsAreCappedAndGoWithTheJob) {
  Metrics metrics(1);
  metrics.OnJobRegistered("first", 1);
  metrics.OnJobRegistered("second", 1);
  EXPECT_THAT(Page(metrics), HasSubstr("job=\"first\""));
  EXPECT_THAT(Page(metrics), Not(HasSubstr("job=\"second\"")));
  metrics.OnJobRemoved("first", /*unused=*/false);
  EXPECT_THAT(Page(metrics), Not(HasSubstr("job=\"")));
  metrics.OnJobRegistered("second", 2);
  EXPECT_THAT(Page(metrics), HasSubstr("job=\"second\""));
  // A plan of a job without a label counts all the same.
  metrics.OnPlanSealed(MakePlan("first"), {});
  EXPECT_THAT(Page(metrics),
              HasSubstr("pipeweaver_plans_sealed_total{origin=\"safe\"} 1"));
}

TEST(MetricsTest, ThePagePassesPromtool) {
  if (std::system("command -v promtool >/dev/null 2>&1") != 0) {
    GTEST_SKIP() << "skipped: promtool (Debian package prometheus) missing";
  }
  Metrics metrics(10);
  Exercise(metrics);
  const std::string path = ::testing::TempDir() + "/page.txt";
  std::ofstream(path) << Page(metrics);
  EXPECT_EQ(std::system(("promtool check metrics < " + path).c_str()), 0);
}

}  // namespace
}  // namespace pipeweaver::server
