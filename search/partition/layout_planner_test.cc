// The paper's rule, even ranks, and the refinement by simulated makespan.

#include "search/partition/layout_planner.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/partition/layout_refiner.h"
#include "search/partition/usual_batch.h"
#include "search/problem/bound.h"
#include "search/problem/problem_graph.h"
#include "search/testing/slowest_cost.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

semu::Job JobOf(const std::string& name) {
  return *semu::JobFromProto(*semu::MakeSetup(name));
}

absl::StatusOr<int64_t> Bound(const StepProblem& step) {
  return LowerBound(BuildProblemGraph(step.problem));
}

// A job of as many layers a module.
semu::Job LongJob(int layers) {
  semu::Job job = JobOf("vlm-s");
  for (semu::Module& module : job.modules) {
    module.layers = {module.layers[1]};
    module.layers[0].count = layers;
  }
  return job;
}

TEST(EfficientTokensTest, IsTheSmallestThatIsEfficient) {
  const semu::Job job = JobOf("vlm-s");
  const semu::OpGraphCost costs;
  const auto ns_a_token = [&](int module, int64_t tokens) {
    const std::vector<int64_t> times =
        LayerTimesNs(job, module, UsualShape(job, module, tokens), costs);
    return static_cast<double>(
               std::accumulate(times.begin(), times.end(), int64_t{0})) /
           static_cast<double>(tokens);
  };
  for (int m = 0; m < 2; ++m) {
    const int64_t item = UsualItemTokens(job, m);
    const int64_t tokens = EfficientTokens(job, m, costs);
    EXPECT_EQ(tokens % item, 0);
    ASSERT_GT(tokens, item);
    const double best = ns_a_token(m, job.max_microbatch_tokens[m]);
    EXPECT_LT(ns_a_token(m, tokens), best / 0.95 * 1.001);
    EXPECT_GT(ns_a_token(m, tokens - item), best / 0.95 * 0.999);
  }
  EXPECT_EQ(UsualItemTokens(job, 0), 52 * 52);
}

TEST(EfficientTokensTest, StaysWithinTheLargestBucket) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_executor()->add_shape_buckets(6000);
  const semu::Job job = *semu::JobFromProto(proto);
  EXPECT_LE(EfficientTokens(job, 0, semu::OpGraphCost()), 6000);
}

std::vector<int64_t> RankLoads(const semu::Job& job, const semu::Layout& layout,
                               const LayerTimes& times) {
  std::vector<int64_t> loads(job.parallelism.pipeline_parallel, 0);
  for (size_t m = 0; m < times.size(); ++m) {
    for (const semu::PipelineSegment& segment : layout.modules[m].segments) {
      for (const semu::Chunk& chunk : segment.chunks) {
        for (int l = 0; l < chunk.num_layers; ++l) {
          loads[chunk.rank] += times[m][chunk.first_layer + l];
        }
      }
    }
  }
  return loads;
}

TEST(PlanLayoutTest, EverySetupHasAValidEvenLayout) {
  const semu::OpGraphCost costs;
  for (const std::string& name : semu::SetupNames()) {
    SCOPED_TRACE(name);
    const semu::Job job = JobOf(name);
    const semu::Layout layout = *PlanLayout(job, costs);
    const auto read =
        semu::LayoutFromProto(semu::LayoutToProto(layout, job), job);
    EXPECT_TRUE(read.ok()) << read.status();
    const std::vector<int64_t> loads =
        RankLoads(job, layout, *MeanLayerTimes(job, UsualBatch(job, 4), costs));
    const double mean = static_cast<double>(std::accumulate(
                            loads.begin(), loads.end(), int64_t{0})) /
                        static_cast<double>(loads.size());
    EXPECT_LT(
        static_cast<double>(*std::max_element(loads.begin(), loads.end())),
        1.06 * mean);
  }
}

TEST(PaperLayoutShapeTest, SegmentsFollowLatencyWithinTheCaps) {
  v1::Job proto = *semu::MakeSetup("t2v-s");
  const semu::OpGraphCost costs;
  const LayoutShape shape =
      *PaperLayoutShape(*semu::JobFromProto(proto), costs);
  EXPECT_EQ(shape.modules[0].segments, 1);
  EXPECT_GT(shape.modules[1].segments, 1);
  proto.mutable_executor()->set_max_segments(1);
  EXPECT_EQ(
      PaperLayoutShape(*semu::JobFromProto(proto), costs)->modules[1].segments,
      1);
}

TEST(PlaceLayersTest, ShortModulesSkipRanks) {
  const semu::Job job = JobOf("omni");
  const semu::Layout layout = *PlanLayout(job, semu::OpGraphCost());
  // One projector layer, on the rank where the audio encoder ends.
  ASSERT_EQ(layout.modules[2].segments.size(), 1u);
  ASSERT_EQ(layout.modules[2].segments[0].chunks.size(), 1u);
  EXPECT_EQ(layout.modules[2].segments[0].chunks[0].rank, 7);
}

TEST(MeanLayerTimesTest, TimesThatSumUpToTooMuchAreInvalid) {
  // Two modules of layers that take 3e14 ns each.
  const testing::SlowestCost costs;
  const semu::Job fits = LongJob(7'000);
  const auto times = MeanLayerTimes(fits, UsualBatch(fits, 1), costs);
  ASSERT_TRUE(times.ok()) << times.status();
  EXPECT_EQ((*times)[1].back(), 3 * semu::kMaxCost);
  const semu::Job job = LongJob(20'000);
  const std::vector<semu::Batch> samples = {UsualBatch(job, 1)};
  const absl::Status statuses[] = {
      MeanLayerTimes(job, samples[0], costs).status(),
      PaperLayoutShape(job, costs).status(),
      PlanLayout(job, costs).status(),
      RefineLayout(job, costs, samples, samples, Bound).status(),
  };
  for (const absl::Status& status : statuses) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(status.message(), HasSubstr("all layers take 1.2e+19 ns"));
  }
}

TEST(UsualBatchTest, ItemsAreConsumedAndFit) {
  for (const std::string& name : semu::SetupNames()) {
    SCOPED_TRACE(name);
    const semu::Job job = JobOf(name);
    const semu::Batch batch = UsualBatch(job, 4);
    ASSERT_EQ(batch.microbatches.size(), 4u);
    for (const semu::Microbatch& microbatch : batch.microbatches) {
      for (size_t m = 0; m < job.modules.size(); ++m) {
        const std::vector<int64_t>& items = microbatch.item_tokens[m];
        EXPECT_FALSE(items.empty()) << job.modules[m].name;
        EXPECT_LE(std::accumulate(items.begin(), items.end(), int64_t{0}),
                  job.max_microbatch_tokens[m]);
      }
      for (size_t e = 0; e < job.edges.size(); ++e) {
        EXPECT_FALSE(microbatch.uses[e].empty());
      }
    }
    EXPECT_LT(batch.microbatches[0].item_tokens[0].size(),
              batch.microbatches[3].item_tokens[0].size());
  }
}

TEST(VariedBatchTest, MicrobatchesDifferAndFit) {
  for (const std::string& name : semu::SetupNames()) {
    const semu::Job job = JobOf(name);
    const semu::Batch batch = VariedBatch(job, 16, 7);
    const semu::Batch again = VariedBatch(job, 16, 7);
    ASSERT_EQ(batch.microbatches.size(), 16);
    for (size_t m = 0; m < job.modules.size(); ++m) {
      std::vector<int64_t> totals;
      for (size_t b = 0; b < batch.microbatches.size(); ++b) {
        const auto& items = batch.microbatches[b].item_tokens[m];
        EXPECT_EQ(items, again.microbatches[b].item_tokens[m]);
        totals.push_back(
            std::accumulate(items.begin(), items.end(), int64_t{0}));
        EXPECT_LE(totals.back(), job.max_microbatch_tokens[m]);
      }
      EXPECT_NE(*std::min_element(totals.begin(), totals.end()),
                *std::max_element(totals.begin(), totals.end()));
    }
  }
}

int MostSegments(const StepProblem& step) {
  int most = 0;
  for (const SweepOrigin& sweep : step.sweeps) {
    most = std::max(most, sweep.segment + 1);
  }
  return most;
}

int MostSegments(const RefinedLayout& refined) {
  int most = 0;
  for (const LayoutShape::ModuleShape& module : refined.shape.modules) {
    most = std::max(most, module.segments);
  }
  return most;
}

TEST(RefineLayoutTest, NeverWorseThanThePapersRuleAndDeterministic) {
  const semu::Job job = JobOf("vlm-m");
  const std::vector<semu::Batch> samples = {UsualBatch(job, 8)};
  const std::vector<semu::Batch> held_out = {VariedBatch(job, 8, 1)};
  const auto refined =
      RefineLayout(job, semu::OpGraphCost(), samples, held_out, Bound);
  ASSERT_TRUE(refined.ok()) << refined.status();
  EXPECT_GT(refined->paper_ns, 0);
  EXPECT_LE(refined->refined_ns, refined->paper_ns);
  EXPECT_LE(refined->layouts_evaluated, 150);
  EXPECT_TRUE(
      semu::LayoutFromProto(semu::LayoutToProto(refined->layout, job), job)
          .ok());
  const auto again =
      RefineLayout(job, semu::OpGraphCost(), samples, held_out, Bound);
  EXPECT_EQ(semu::LayoutToProto(refined->layout, job).SerializeAsString(),
            semu::LayoutToProto(again->layout, job).SerializeAsString());
}

TEST(RefineLayoutTest, FollowsTheEvaluator) {
  // An evaluator that wants as many sweeps from the last rank back as there
  // are.
  const StepEvaluator wants_v =
      [](const StepProblem& step) -> absl::StatusOr<int64_t> {
    int64_t descending = 0;
    for (const Sweep& sweep : step.problem.sweeps) {
      descending += sweep.stages.front().rank > sweep.stages.back().rank;
    }
    return 1'000'000'000 / (1 + descending);
  };
  v1::Job proto = *semu::MakeSetup("vlm-s");
  for (const bool v_placement : {true, false}) {
    proto.mutable_executor()->set_v_placement(v_placement);
    const semu::Job job = *semu::JobFromProto(proto);
    const std::vector<semu::Batch> samples = {UsualBatch(job, 4)};
    const auto refined =
        RefineLayout(job, semu::OpGraphCost(), samples, samples, wants_v);
    ASSERT_TRUE(refined.ok());
    bool any = false;
    for (const auto& module : refined->shape.modules) {
      for (const bool down : module.descending) any |= down;
    }
    EXPECT_EQ(any, v_placement);
  }
}

// Layouts of vlm-s, chosen on one batch and judged by another.
class HeldOutBatchTest : public ::testing::Test {
 protected:
  absl::StatusOr<RefinedLayout> Refine(
      const StepEvaluator& evaluator, const RefineOptions& options = {}) const {
    return RefineLayout(job_, semu::OpGraphCost(), samples_, held_out_,
                        evaluator, options);
  }

  static bool IsHeldOut(const StepProblem& step) {
    return step.problem.sweeps.back().microbatch + 1 == kHeldOut;
  }

  static constexpr int kHeldOut = 3;  // microbatches
  const semu::Job job_ = JobOf("vlm-s");
  const std::vector<semu::Batch> samples_ = {UsualBatch(job_, 4)};
  const std::vector<semu::Batch> held_out_ = {UsualBatch(job_, kHeldOut)};
};

TEST_F(HeldOutBatchTest, KeepsThePapersLayoutWhereItDisagrees) {
  for (const bool agrees : {false, true}) {
    // One segment of everything is the shortest, in the samples.
    const StepEvaluator evaluator =
        [&](const StepProblem& step) -> absl::StatusOr<int64_t> {
      if (IsHeldOut(step) && !agrees) return 1000;
      return 1000 * static_cast<int64_t>(step.problem.sweeps.size());
    };
    const auto refined = Refine(evaluator);
    ASSERT_TRUE(refined.ok());
    if (agrees) {
      EXPECT_LT(refined->refined_ns, refined->paper_ns);
    } else {
      EXPECT_EQ(refined->refined_ns, refined->paper_ns);
    }
    EXPECT_EQ(refined->is_paper, !agrees);
    const LayoutShape paper = *PaperLayoutShape(job_, semu::OpGraphCost());
    bool same = true;
    for (size_t m = 0; m < job_.modules.size(); ++m) {
      same &= refined->shape.modules[m].segments == paper.modules[m].segments &&
              refined->shape.modules[m].sub_microbatch_tokens ==
                  paper.modules[m].sub_microbatch_tokens;
    }
    EXPECT_EQ(same, !agrees);
  }
}

TEST_F(HeldOutBatchTest, TheBestIsTakenWhereItIsAgainstFewerStages) {
  for (const bool agrees : {false, true}) {
    // Three segments are best; one is hardly worse, but for the held-out batch.
    const StepEvaluator evaluator =
        [&](const StepProblem& step) -> absl::StatusOr<int64_t> {
      const int segments = MostSegments(step);
      if (segments == 1) return IsHeldOut(step) && !agrees ? 30'000 : 10'010;
      return segments == 3 ? 10'000 : 20'000;
    };
    const auto refined = Refine(evaluator);
    ASSERT_TRUE(refined.ok()) << refined.status();
    EXPECT_FALSE(refined->is_paper);
    EXPECT_EQ(refined->refined_ns, agrees ? 10'010 : 10'000);
    EXPECT_EQ(MostSegments(*refined), agrees ? 1 : 3);
  }
}

TEST_F(HeldOutBatchTest, WhatFailsOnItIsNotTaken) {
  for (const bool refined_fails : {false, true}) {
    for (const bool paper_fails : {false, true}) {
      // One segment is the shortest, in the samples.
      const StepEvaluator evaluator =
          [&](const StepProblem& step) -> absl::StatusOr<int64_t> {
        const int segments = MostSegments(step);
        const auto sweeps = static_cast<int64_t>(step.problem.sweeps.size());
        if (!IsHeldOut(step)) return 1000 * sweeps;
        if (segments == 1 ? refined_fails : paper_fails) {
          return absl::ResourceExhaustedError(
              absl::StrCat("too long in ", segments, " segments"));
        }
        return segments == 1 ? 1'000'000 * sweeps : 1000 * sweeps;
      };
      const auto refined = Refine(evaluator);
      if (refined_fails && paper_fails) {
        EXPECT_EQ(refined.status().code(),
                  absl::StatusCode::kResourceExhausted);
        EXPECT_THAT(refined.status().message(),
                    HasSubstr("too long in 1 segments"));
        continue;
      }
      ASSERT_TRUE(refined.ok()) << refined.status();
      // Much longer than the paper's on the held-out batch, it is taken only
      // where the paper's fails.
      EXPECT_EQ(refined->is_paper, !paper_fails);
      EXPECT_EQ(MostSegments(*refined) == 1, paper_fails);
    }
  }
}

TEST_F(HeldOutBatchTest, Cancelled) {
  std::atomic<bool> cancelled = false;
  const StepEvaluator evaluator =
      [&](const StepProblem& step) -> absl::StatusOr<int64_t> {
    if (IsHeldOut(step)) cancelled = true;
    return 1000 * static_cast<int64_t>(step.problem.sweeps.size());
  };
  const auto refined =
      Refine(evaluator, {.cancelled = [&] { return cancelled.load(); }});
  EXPECT_EQ(refined.status().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(cancelled);
}

TEST(RefineLayoutTest, NoWorseSaysWhatFewerStagesMayCost) {
  const semu::Job job = JobOf("vlm-s");
  const std::vector<semu::Batch> samples = {UsualBatch(job, 4)};
  // The more sweeps, the shorter, each the less so.
  const StepEvaluator evaluator =
      [](const StepProblem& step) -> absl::StatusOr<int64_t> {
    return 10'000 + 10'000 / static_cast<int64_t>(step.problem.sweeps.size());
  };
  const auto sweeps = [&](double no_worse) {
    const auto refined =
        RefineLayout(job, semu::OpGraphCost(), samples, samples, evaluator,
                     {.no_worse = no_worse, .convincing = 2});
    EXPECT_TRUE(refined.ok()) << refined.status();
    return 10'000 / (refined->refined_ns - 10'000);
  };
  const int64_t many = sweeps(1), fewer = sweeps(1.002), few = sweeps(1.015);
  EXPECT_GT(many, fewer);
  EXPECT_GT(fewer, few);
}

TEST(RefineLayoutTest, ThreadsHaveNoSayInTheLayout) {
  const semu::Job job = JobOf("vlm-s");
  const std::vector<semu::Batch> samples = {VariedBatch(job, 8, 1),
                                            VariedBatch(job, 8, 2)};
  const std::vector<semu::Batch> held_out = {VariedBatch(job, 8, 3)};
  std::string first;
  for (const int threads : {1, 2, 5}) {
    const auto refined = RefineLayout(job, semu::OpGraphCost(), samples,
                                      held_out, Bound, {.threads = threads});
    ASSERT_TRUE(refined.ok()) << refined.status();
    const std::string bytes =
        semu::LayoutToProto(refined->layout, job).SerializeAsString();
    if (first.empty()) first = bytes;
    EXPECT_EQ(bytes, first) << threads << " threads";
  }
}

TEST(RefineLayoutTest, TakesFewerStagesWhereNothingIsLost) {
  // Any layout is as good as any other.
  const StepEvaluator indifferent =
      [](const StepProblem&) -> absl::StatusOr<int64_t> { return 1000; };
  const semu::Job job = JobOf("vlm-s");
  const std::vector<semu::Batch> samples = {UsualBatch(job, 4)};
  const auto refined = RefineLayout(job, semu::OpGraphCost(), samples, samples,
                                    indifferent, {.convincing = 1});
  ASSERT_TRUE(refined.ok());
  EXPECT_FALSE(refined->is_paper);
  for (size_t m = 0; m < job.modules.size(); ++m) {
    EXPECT_EQ(refined->shape.modules[m].segments, 1);
    EXPECT_EQ(refined->shape.modules[m].sub_microbatch_tokens,
              job.max_microbatch_tokens[m]);
  }
}

TEST(RefineLayoutTest, LeavesOutWhatDoesNotFitAndWhatHasManyStages) {
  // The more stages, the shorter.
  const StepEvaluator evaluator =
      [](const StepProblem& step) -> absl::StatusOr<int64_t> {
    return 1'000'000'000 / static_cast<int64_t>(step.problem.sweeps.size());
  };
  const semu::Job job = JobOf("vlm-s");
  const std::vector<semu::Batch> samples = {UsualBatch(job, 4)};
  RefineOptions options;
  const auto any = RefineLayout(job, semu::OpGraphCost(), samples, samples,
                                evaluator, options);
  ASSERT_TRUE(any.ok());
  EXPECT_GT(MostSegments(*any), 2);
  options.fits = [](const semu::Layout& layout) {
    for (const semu::ModuleLayout& module : layout.modules) {
      if (module.segments.size() > 2) return absl::ResourceExhaustedError("no");
    }
    return absl::OkStatus();
  };
  const auto fitting = RefineLayout(job, semu::OpGraphCost(), samples, samples,
                                    evaluator, options);
  ASSERT_TRUE(fitting.ok());
  EXPECT_EQ(MostSegments(*fitting), 2);

  // So many microbatches that the paper's layout has too many stages already.
  const std::vector<semu::Batch> large = {UsualBatch(job, 512)};
  const auto bounded =
      RefineLayout(job, semu::OpGraphCost(), large, large, evaluator);
  ASSERT_TRUE(bounded.ok());
  EXPECT_TRUE(bounded->is_paper);
}

TEST(RefineLayoutTest, EndsWhenCancelled) {
  const semu::Job job = JobOf("vlm-s");
  const std::vector<semu::Batch> samples = {UsualBatch(job, 4)};
  for (const int after : {0, 1, 20}) {
    std::atomic<int> evaluated = 0;
    const StepEvaluator evaluator = [&](const StepProblem& step) {
      ++evaluated;
      return Bound(step);
    };
    RefineOptions options;
    options.cancelled = [&] { return evaluated >= after; };
    EXPECT_EQ(RefineLayout(job, semu::OpGraphCost(), samples, samples,
                           evaluator, options)
                  .status()
                  .code(),
              absl::StatusCode::kCancelled);
    EXPECT_LE(evaluated, after + 8);
  }
}

TEST(RefineLayoutTest, StopsAtItsMostStages) {
  const semu::Job job = JobOf("vlm-m");
  const std::vector<semu::Batch> samples = {UsualBatch(job, 8)};
  const auto refined =
      RefineLayout(job, semu::OpGraphCost(), samples, samples, Bound,
                   {.max_layouts = 100, .max_stages = 1});
  ASSERT_TRUE(refined.ok());
  EXPECT_EQ(refined->layouts_evaluated, 2);  // where it starts
}

TEST(RefineLayoutTest, MakespansThatSumUpToTooMuchAreInvalid) {
  const semu::Job job = JobOf("vlm-s");
  const std::vector<semu::Batch> samples(2, UsualBatch(job, 4));
  const StepEvaluator slow = [](const StepProblem&) {
    return absl::StatusOr<int64_t>(int64_t{1} << 62);
  };
  const auto refined =
      RefineLayout(job, semu::OpGraphCost(), samples, samples, slow);
  EXPECT_EQ(refined.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(refined.status().message(),
              HasSubstr("sample batch 1: takes 4611686018427387904 ns"));
}

TEST(RefineLayoutTest, SaysWhyNothingFits) {
  const semu::Job job = JobOf("vlm-s");
  const std::vector<semu::Batch> samples = {UsualBatch(job, 4)};
  const StepEvaluator never =
      [](const StepProblem&) -> absl::StatusOr<int64_t> {
    return absl::ResourceExhaustedError("rank 3 is full");
  };
  const auto refined =
      RefineLayout(job, semu::OpGraphCost(), samples, samples, never);
  EXPECT_EQ(refined.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(refined.status().message(), HasSubstr("rank 3 is full"));
}

}  // namespace
}  // namespace pipeweaver::search
