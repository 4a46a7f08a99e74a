// Steps of real set-ups, right and wrong.

#include "search/lower/coverage_checker.h"

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/partition/layout_planner.h"
#include "search/partition/step_problem_builder.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

struct Case {
  semu::Job job;
  semu::Batch batch;
  StepProblem step;
};

Case MakeCase(const std::string& setup, bool forward_only = false) {
  v1::Job proto = *semu::MakeSetup(setup);
  Case c;
  c.job = *semu::JobFromProto(proto);
  semu::SampleOptions sample;
  sample.microbatches = 6;
  v1::BatchMetadata batch = *semu::SampleBatch(proto, sample);
  batch.set_forward_only(forward_only);
  c.batch = *semu::BatchFromProto(batch, c.job);
  const semu::OpGraphCost costs;
  const std::vector<int64_t> limits(c.job.parallelism.pipeline_parallel,
                                    int64_t{1} << 40);
  c.step = *BuildStepProblem(c.job, *PlanLayout(c.job, costs), limits, c.batch,
                             costs);
  return c;
}

absl::Status Check(const Case& c) {
  return CheckCoverage(c.job, c.batch, c.step);
}

TEST(CoverageCheckerTest, PassesWhatCoversTheBatch) {
  for (const char* setup : {"vlm-s", "t2v-s", "omni", "vlm-xl-frozen"}) {
    for (const bool forward_only : {false, true}) {
      EXPECT_TRUE(Check(MakeCase(setup, forward_only)).ok()) << setup;
    }
  }
}

TEST(CoverageCheckerTest, RefusesEveryMutation) {
  struct Mutation {
    const char* said;
    std::function<void(Case&)> apply;
  };
  const Mutation mutations[] = {
      {" is in no sub-microbatch",
       [](Case& c) { c.step.sub_microbatches[0].items.pop_back(); }},
      {" is in two sub-microbatches",
       [](Case& c) {
         auto& items = c.step.sub_microbatches[0].items;
         items.push_back(items[0]);
       }},
      {" has no item 1000",
       [](Case& c) { c.step.sub_microbatches[0].items.push_back(1000); }},
      {"which are not there",
       [](Case& c) { c.step.sub_microbatches[0].microbatch = 6; }},
      {" is not listed as empty, and has no items",
       [](Case& c) { c.step.empty.pop_back(); }},
      {" is listed as empty, but has items",
       [](Case& c) {
         const SubMicrobatch& sub = c.step.sub_microbatches[0];
         c.step.empty.emplace_back(sub.microbatch, sub.module);
       }},
      {" is listed as empty, and is not there or is listed twice",
       [](Case& c) { c.step.empty.emplace_back(6, 0); }},
      {" does not wait for the segment before it",
       [](Case& c) {
         for (size_t s = 0; s < c.step.sweeps.size(); ++s) {
           if (c.step.sweeps[s].segment > 0) {
             c.step.problem.sweeps[s].after.clear();
           }
         }
       }},
      {"consumes",
       [](Case& c) {
         for (size_t s = 0; s < c.step.sweeps.size(); ++s) {
           if (c.step.sweeps[s].segment == 0) {
             c.step.problem.sweeps[s].after.clear();
           }
         }
       }},
      {" has no backward",
       [](Case& c) { c.step.problem.sweeps[0].backward = false; }},
      {" has a backward", [](Case& c) { c.batch.forward_only = true; }},
      {" is not there or runs twice",
       [](Case& c) { c.step.sweeps[0] = c.step.sweeps.back(); }},
  };
  const Case right = MakeCase("vlm-s");
  ASSERT_TRUE(Check(right).ok());
  ASSERT_FALSE(right.step.empty.empty());
  for (const Mutation& mutation : mutations) {
    Case wrong = right;
    mutation.apply(wrong);
    const absl::Status status = Check(wrong);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition)
        << mutation.said;
    EXPECT_THAT(std::string(status.message()), HasSubstr(mutation.said));
  }
}

TEST(CoverageCheckerTest, NoticesAWholeMicrobatchThatIsMissing) {
  Case c = MakeCase("vlm-s");
  c.batch.microbatches.push_back(c.batch.microbatches[0]);
  EXPECT_THAT(std::string(Check(c).message()),
              HasSubstr("microbatch 6, module 0: item 0 is in no "
                        "sub-microbatch"));
}

}  // namespace
}  // namespace pipeweaver::search
