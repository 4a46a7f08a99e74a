// Tests of what executed steps say of costs.

#include "search/cost_observations.h"

#include <cstdint>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "semu/cost/calibration/calibrated_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

struct Planned {
  std::shared_ptr<const PlannableJob> job;
  StepPlan plan;
};

Planned PlanSetup(const StepPlanner& planner, const char* name) {
  const v1::Job proto = *semu::MakeSetup(name);
  const semu::Job job = *semu::JobFromProto(proto);
  Planned planned;
  planned.job = *planner.Prepare(job, std::nullopt, {});
  const semu::Batch batch = *semu::BatchFromProto(
      *semu::SampleBatch(proto, {.seed = 3, .microbatches = 6}), job);
  planned.plan = *planner.PlanSafe(*planned.job, batch);
  return planned;
}

std::vector<int64_t> PredictedDurations(const std::vector<Action>& program) {
  std::vector<int64_t> durations_ns;
  durations_ns.reserve(program.size());
  for (const Action& action : program) {
    durations_ns.push_back(action.end_ns - action.start_ns);
  }
  return durations_ns;
}

TEST(CostObservationsTest, PartsSumToThePrediction) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  for (const char* name : {"vlm-s", "t2v-s", "vlm-s-frozen"}) {
    SCOPED_TRACE(name);
    const Planned planned = PlanSetup(*planner, name);
    int observed = 0;
    for (size_t rank = 0; rank < planned.plan.programs.ranks.size(); ++rank) {
      for (const semu::CostObservation& observation :
           ObserveCosts(*planned.job, planned.plan, static_cast<int>(rank),
                        PredictedDurations(planned.plan.programs.ranks[rank]),
                        *planned.job->costs, 1'000'000, 0)) {
        int64_t sum_ns = 0;
        for (const int64_t ns : observation.predicted_ns) sum_ns += ns;
        // Rounding, one layer at a time.
        EXPECT_NEAR(static_cast<double>(sum_ns),
                    static_cast<double>(observation.measured_ns), 1000);
        ++observed;
      }
    }
    EXPECT_GT(observed, 10);
  }
}

TEST(CostObservationsTest, TakesAnEvenShare) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Planned planned = PlanSetup(*planner, "vlm-s");
  const std::vector<int64_t> durations_ns =
      PredictedDurations(planned.plan.programs.ranks[0]);
  const auto all = ObserveCosts(*planned.job, planned.plan, 0, durations_ns,
                                *planned.job->costs, 1'000'000, 0);
  const auto some = ObserveCosts(*planned.job, planned.plan, 0, durations_ns,
                                 *planned.job->costs, 7, 0);
  ASSERT_GT(all.size(), 14u);
  EXPECT_LE(some.size(), 7u);
  EXPECT_GE(some.size(), 4u);
  // In turns all are seen.
  const auto turns = static_cast<int64_t>((all.size() + 6) / 7);
  size_t seen = 0;
  for (int64_t turn = 0; turn < turns; ++turn) {
    seen += ObserveCosts(*planned.job, planned.plan, 0, durations_ns,
                         *planned.job->costs, 7, turn)
                .size();
  }
  EXPECT_EQ(seen, all.size());
  EXPECT_EQ(some[0].predicted_ns, all[0].predicted_ns);
}

// A machine whose parts take other times than predicted is found out.
TEST(CostObservationsTest, CalibrationFindsTheFactorsOfASimulatedMachine) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Planned predicted = PlanSetup(*planner, "vlm-s");
  semu::Calibration machine;
  const auto part = [](semu::LayerKind kind, semu::CostPass pass) {
    return semu::CostPart(kind, pass);
  };
  const int forward =
      part(semu::LayerKind::kTransformer, semu::CostPass::kForward);
  const int head = part(semu::LayerKind::kLmHead, semu::CostPass::kForward);
  machine.factors[forward] = 1.5;
  machine.factors[head] = 0.6;
  PlannableJob slow = *predicted.job;
  slow.costs =
      std::make_shared<semu::CalibratedCost>(*predicted.job->costs, machine);
  const semu::Batch batch =
      *semu::BatchFromProto(*semu::SampleBatch(*semu::MakeSetup("vlm-s"),
                                               {.seed = 3, .microbatches = 6}),
                            slow.job);
  const StepPlan executed = *planner->PlanSafe(slow, batch);
  semu::Calibrator calibrator;
  for (size_t rank = 0; rank < executed.programs.ranks.size(); ++rank) {
    for (const semu::CostObservation& observation :
         ObserveCosts(slow, executed, static_cast<int>(rank),
                      PredictedDurations(executed.programs.ranks[rank]),
                      *predicted.job->costs, 256, 0)) {
      calibrator.Add(observation);
    }
  }
  const auto calibration = calibrator.Publish();
  ASSERT_TRUE(calibration);
  EXPECT_NEAR(calibration->factors[forward], 1.5, 0.03);
  EXPECT_NEAR(calibration->factors[head], 0.6, 0.05);
  EXPECT_LT(calibration->error_after, 0.01);
  EXPECT_GT(calibration->error_before, 0.1);
}

}  // namespace
}  // namespace pipeweaver::search
