#include "search/planner.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "google/protobuf/text_format.h"
#include "gtest/gtest.h"
#include "search/partition/baselines.h"
#include "search/partition/layout_planner.h"
#include "search/plan_evaluator.h"
#include "search/testing/slowest_cost.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

struct Case {
  std::shared_ptr<const PlannableJob> job;
  semu::Batch batch;
};

Case MakeCase(const StepPlanner& planner, const std::string& setup,
              int microbatches, uint64_t seed = 1) {
  const v1::Job proto = *semu::MakeSetup(setup);
  const semu::Job job = *semu::JobFromProto(proto);
  Case result;
  auto prepared = planner.Prepare(job, std::nullopt, {});
  EXPECT_TRUE(prepared.ok()) << setup << ": " << prepared.status();
  if (!prepared.ok()) return result;
  result.job = *std::move(prepared);
  semu::SampleOptions sample;
  sample.microbatches = microbatches;
  sample.seed = seed;
  result.batch = *semu::BatchFromProto(*semu::SampleBatch(proto, sample), job);
  return result;
}

PlanOptions Evaluations(int64_t evaluations, int threads = 1) {
  PlanOptions options;
  options.search.budget.evaluations = evaluations;
  options.search.threads = threads;
  return options;
}

void ExpectSamePlan(const StepPlan& a, const StepPlan& b) {
  ASSERT_EQ(a.programs.ranks.size(), b.programs.ranks.size());
  EXPECT_EQ(a.report.makespan_ns, b.report.makespan_ns);
  for (size_t rank = 0; rank < a.programs.ranks.size(); ++rank) {
    const auto& left = a.programs.ranks[rank];
    const auto& right = b.programs.ranks[rank];
    ASSERT_EQ(left.size(), right.size());
    for (size_t i = 0; i < left.size(); ++i) {
      EXPECT_EQ(left[i].kind, right[i].kind);
      EXPECT_EQ(left[i].sweep, right[i].sweep);
      EXPECT_EQ(left[i].choice, right[i].choice);
      EXPECT_EQ(left[i].transfer, right[i].transfer);
    }
  }
}

class EverySetupTest : public ::testing::TestWithParam<std::string> {};

TEST_P(EverySetupTest, IsPlannedWithinMemoryAndNotBelowItsBound) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Case c = MakeCase(*planner, GetParam(), /*microbatches=*/8);
  ASSERT_NE(c.job, nullptr);
  const auto plan = planner->Plan(*c.job, c.batch, Evaluations(20));
  ASSERT_TRUE(plan.ok()) << plan.status();
  const StepReport& report = plan->report;
  EXPECT_GT(report.lower_bound_ns, 0);
  EXPECT_GE(report.schedule_makespan_ns, report.lower_bound_ns);
  EXPECT_GE(report.makespan_ns, report.schedule_makespan_ns);
  EXPECT_GE(report.flow_lower_bound_ns, report.lower_bound_ns);
  EXPECT_LE(report.layout_free_bound_ns, report.schedule_makespan_ns);
  EXPECT_GE(report.bubble_ratio, 0);
  EXPECT_LT(report.bubble_ratio, 1);
  for (const int64_t peak : report.peak_memory_bytes) {
    EXPECT_LE(peak, c.job->job.memory_budget_bytes);
  }
  const auto safe = planner->PlanSafe(*c.job, c.batch);
  ASSERT_TRUE(safe.ok()) << safe.status();
  EXPECT_LE(report.schedule_makespan_ns, safe->report.schedule_makespan_ns);
}

INSTANTIATE_TEST_SUITE_P(Planner, EverySetupTest,
                         ::testing::ValuesIn(semu::SetupNames()),
                         [](const ::testing::TestParamInfo<std::string>& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

TEST(PlannerTest, TheSameInputGivesTheSamePlanForAnyThreads) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Case c = MakeCase(*planner, "vlm-s", /*microbatches=*/12);
  const auto one = planner->Plan(*c.job, c.batch, Evaluations(100, 1));
  const auto four = planner->Plan(*c.job, c.batch, Evaluations(100, 4));
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_TRUE(four.ok()) << four.status();
  ExpectSamePlan(*one, *four);
}

TEST(PlannerTest, JitterIsJudgedAlikeForAnyThreads) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Case c = MakeCase(*planner, "t2v-s", /*microbatches=*/8);
  PlanOptions options = Evaluations(60, 1);
  options.jitter.duration_noise = 0.05;
  const auto one = planner->Plan(*c.job, c.batch, options);
  options.search.threads = 4;
  const auto four = planner->Plan(*c.job, c.batch, options);
  ASSERT_TRUE(one.ok()) << one.status();
  ASSERT_TRUE(four.ok()) << four.status();
  ExpectSamePlan(*one, *four);
  EXPECT_EQ(one->report.expected_makespan_ns,
            four->report.expected_makespan_ns);
  // The plain plan, which gets 0.7 of the budget, is not expected to be better.
  const auto plain = planner->Plan(*c.job, c.batch, Evaluations(42));
  const PlanEvaluator evaluator(plain->step, plain->programs,
                                LinkSpeedsOf(c.job->job));
  int64_t sum_ns = 0;
  for (int run = 0; run < options.jitter.runs; ++run) {
    sum_ns += evaluator
                  .Evaluate({.duration_noise = 0.05,
                             .seed = options.jitter.seed + run})
                  ->makespan_ns;
  }
  EXPECT_LE(one->report.expected_makespan_ns, sum_ns / options.jitter.runs);

  options.jitter.duration_noise = 2;
  EXPECT_THAT(
      std::string(planner->Plan(*c.job, c.batch, options).status().message()),
      HasSubstr("duration_noise 2"));
}

TEST(PlannerTest, JitterTakesNoMoreEvaluationsThanItMay) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Case c = MakeCase(*planner, "t2v-s", /*microbatches=*/4);
  for (const int64_t budget : {1, 2, 3, 8}) {
    PlanOptions options = Evaluations(budget, 1);
    options.jitter.duration_noise = 0.2;
    const auto plan = planner->Plan(*c.job, c.batch, options);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_LE(plan->report.evaluations, budget);
  }
}

// Where transfers do not fit beside what is held, the planner tries again with
// less memory. That no schedule fits into that is not the batch's error.
TEST(PlannerTest, SaysThatTransfersDoNotFit) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  v1::Job proto;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(
      R"pb(
        name: "tight"
        modules {
          name: "image"
          modality: MODALITY_IMAGE
          layers {
            kind: LAYER_KIND_EMBEDDING
            count: 1
            hidden_size: 1024
            vocab_size: 1000
          }
          layers {
            kind: LAYER_KIND_TRANSFORMER
            count: 8
            hidden_size: 1024
            ffn_size: 2048
            heads: 4
            kv_heads: 1
            causal: true
          }
        }
        parallelism {
          tensor_parallel: 4
          pipeline_parallel: 2
          context_parallel: 1
          data_parallel: 1
        }
        device {
          name: "any"
          peak_flops_per_second: 989000000000000
          memory_bandwidth_bytes_per_second: 3350000000000
          memory_bytes: 85899345920
        }
        links {
          tensor_parallel {
            latency_ns: 2000
            bandwidth_bytes_per_second: 200000000000
          }
          p2p_intra_node {
            latency_ns: 2000
            bandwidth_bytes_per_second: 200000000000
          }
          p2p_inter_node {
            latency_ns: 5000
            bandwidth_bytes_per_second: 25000000000
          }
          gpus_per_node: 8
          host { latency_ns: 10000 bandwidth_bytes_per_second: 1000000 }
        }
        memory_budget_bytes: 197265625
        executor {
          offload: true
          selective_recompute: true
          full_recompute: true
          max_receives_ahead: 1
          shape_buckets: [ 256, 512, 1000 ]
        }
        layout {
          modules {
            module: "image"
            sub_microbatch_tokens: 64
            segments { chunks { rank: 1 first_layer: 0 num_layers: 2 } }
            segments {
              chunks { rank: 0 first_layer: 2 num_layers: 2 }
              chunks { rank: 1 first_layer: 4 num_layers: 1 }
            }
            segments { chunks { rank: 0 first_layer: 5 num_layers: 4 } }
            segments { chunks { rank: 1 first_layer: 9 num_layers: 0 } }
          }
        }
        max_microbatch_tokens: 512
      )pb",
      &proto));
  const auto job = semu::JobFromProto(proto);
  ASSERT_TRUE(job.ok()) << job.status();
  const auto layout = semu::LayoutFromProto(proto.layout(), *job);
  ASSERT_TRUE(layout.ok()) << layout.status();
  const auto prepared = planner->Prepare(*job, *layout, {});
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  v1::BatchMetadata metadata;
  for (const std::vector<int>& tokens :
       std::vector<std::vector<int>>{{200, 50, 400, 200, 400},
                                     {50, 400, 1, 7},
                                     {7, 200, 50, 200, 200},
                                     {1},
                                     {1, 50, 400},
                                     {7, 1, 7},
                                     {400, 200, 200},
                                     {400}}) {
    v1::ModuleItems* items = metadata.add_microbatches()->add_items();
    items->mutable_tokens()->Add(tokens.begin(), tokens.end());
  }
  const semu::Batch batch = *semu::BatchFromProto(metadata, *job);
  EXPECT_TRUE(planner->Plan(**prepared, batch, Evaluations(10)).ok());
  const auto status = planner->Plan(**prepared, batch, Evaluations(1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("activations and transfers take"));
}

// A baseline sets as much aside for long items as the planner does.
TEST(PlannerTest, BaselinesSetAsideForLongItems) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  v1::Job proto = *semu::MakeSetup("vlm-s");
  const semu::Batch batch =
      *semu::BatchFromProto(*semu::SampleBatch(proto, {.microbatches = 4}),
                            *semu::JobFromProto(proto));
  proto.set_max_microbatch_tokens(0, 2704);
  proto.set_max_microbatch_tokens(1, 1024);
  const semu::Job job = *semu::JobFromProto(proto);
  const auto prepared =
      planner->Prepare(job, *PlanLayout(job, *planner->Costs()), {});
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  PlanOptions options;
  options.strategy = "1f1b";
  const auto plan = planner->Plan(**prepared, batch, options);
  ASSERT_TRUE(plan.ok()) << plan.status();
  const auto baseline =
      PlanBaseline(Baseline::k1f1b, job, batch, batch, *planner->Costs());
  ASSERT_TRUE(baseline.ok()) << baseline.status();
  const MemoryPlan& memory = baseline->memory;
  for (int r = 0; r < job.parallelism.pipeline_parallel; ++r) {
    const int64_t extra = plan->step.extra_reserve_bytes.at(r);
    EXPECT_GT(extra, 0);
    EXPECT_EQ(plan->step.problem.memory_limit_bytes[r],
              memory.activation_limit_bytes[r] - extra);
    EXPECT_EQ(plan->report.peak_memory_bytes[r],
              memory.static_bytes[r] + extra - memory.transfer_bytes +
                  plan->programs.peak_bytes[r]);
  }
}

TEST(PlannerTest, EveryStrategyThatAppliesPlansTheSampleBatch) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Case c = MakeCase(*planner, "vlm-s", /*microbatches=*/8);
  for (const std::string& name : planner->StrategyNames()) {
    PlanOptions options = Evaluations(20);
    options.strategy = name;
    const auto plan = planner->Plan(*c.job, c.batch, options);
    if (absl::IsResourceExhausted(plan.status())) {
      // A static order that holds more than there is.
      EXPECT_THAT(std::string(plan.status().message()), HasSubstr("over its"))
          << name;
      EXPECT_TRUE(name.starts_with("zb-")) << name;
      continue;
    }
    ASSERT_TRUE(plan.ok()) << name << ": " << plan.status();
    EXPECT_EQ(plan->report.strategy, name);
  }
}

TEST(PlannerTest, AForwardOnlyBatchHasNoBackward) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  Case c = MakeCase(*planner, "t2v-s", /*microbatches=*/4);
  c.batch.forward_only = true;
  const auto plan = planner->Plan(*c.job, c.batch, Evaluations(20));
  ASSERT_TRUE(plan.ok()) << plan.status();
  for (const auto& rank : plan->programs.ranks) {
    for (const Action& action : rank) {
      EXPECT_NE(action.kind, ActionKind::kBackward);
      EXPECT_NE(action.kind, ActionKind::kInputGrad);
      EXPECT_NE(action.kind, ActionKind::kWeightGrad);
      EXPECT_NE(action.kind, ActionKind::kGradsReady);
    }
  }
}

TEST(PlannerTest, NamesAnUnknownStrategyAndThoseThereAre) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  const Case c = MakeCase(*planner, "vlm-s", /*microbatches=*/1);
  PlanOptions options = Evaluations(1);
  options.strategy = "fastest";
  const absl::Status status = planner->Plan(*c.job, c.batch, options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("strategy: fastest"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("megatron"));
}

// A batch whose microbatches have an image and a text of a few tokens.
semu::Batch LightBatch(int64_t image_tokens) {
  semu::Microbatch microbatch;
  microbatch.item_tokens = {{image_tokens}, {100}};
  microbatch.uses = {{semu::ItemUse{0, 0}}};
  semu::Batch batch;
  batch.microbatches.assign(16, microbatch);
  return batch;
}

TEST(PlannerTest, ALayoutForLightSamplesHoldsTheHeaviestMicrobatch) {
  // Half the memory: with the layout that is best for the samples it is short.
  v1::Job proto = *semu::MakeSetup("vlm-l");
  proto.set_memory_budget_bytes(proto.device().memory_bytes() / 2);
  const semu::Job job = *semu::JobFromProto(proto);
  const auto planner = MakeStepPlanner();
  EXPECT_TRUE(planner->Prepare(job, std::nullopt, {}).ok());
  const std::vector<semu::Batch> samples(3, LightBatch(64));
  PrepareOptions options;
  options.samples = samples;
  const auto prepared = planner->Prepare(job, std::nullopt, options);
  EXPECT_TRUE(prepared.ok()) << prepared.status();
}

TEST(PlannerTest, ItemsOfAMicrobatchNeedNotFillIt) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_executor()->add_shape_buckets(4096);
  const semu::Job job = *semu::JobFromProto(proto);
  const auto planner = MakeStepPlanner();
  const auto prepared = planner->Prepare(job, std::nullopt, {});
  EXPECT_TRUE(prepared.ok()) << prepared.status();
}

// Peaks are within the budget, and a plan that offloads is not longer than one
// that does not.
TEST(PlannerTest, OffloadsWhereThatIsShorter) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.set_memory_budget_bytes(int64_t{30} << 30);
  const auto planner = MakeStepPlanner();
  const semu::Batch batch =
      *semu::BatchFromProto(*semu::SampleBatch(proto, {.microbatches = 16}),
                            *semu::JobFromProto(proto));
  std::vector<int64_t> makespan_ns;
  for (const bool offload : {true, false}) {
    proto.mutable_executor()->set_offload(offload);
    const semu::Job job = *semu::JobFromProto(proto);
    const auto prepared =
        planner->Prepare(job, *PlanLayout(job, semu::OpGraphCost()), {});
    ASSERT_TRUE(prepared.ok()) << prepared.status();
    const auto plan = planner->Plan(**prepared, batch, Evaluations(200));
    ASSERT_TRUE(plan.ok()) << plan.status();
    makespan_ns.push_back(plan->report.makespan_ns);
    for (const int64_t bytes : plan->report.peak_memory_bytes) {
      EXPECT_LE(bytes, job.memory_budget_bytes);
    }
  }
  EXPECT_LE(makespan_ns[0], makespan_ns[1]);
}

TEST(PlannerTest, ASampleThatDoesNotFitIsNamedWhereverItStands) {
  const semu::Job job = *semu::JobFromProto(*semu::MakeSetup("vlm-s"));
  const auto planner = MakeStepPlanner();
  std::vector<semu::Batch> samples(3, LightBatch(64));
  for (const size_t heavy : {0, 2}) {
    std::vector<semu::Batch> some = samples;
    some[heavy] = LightBatch(int64_t{1} << 24);
    PrepareOptions options;
    options.samples = some;
    const absl::Status status =
        planner->Prepare(job, std::nullopt, options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(
        std::string(status.message()),
        HasSubstr(heavy == 0 ? "sample batch 0: " : "sample batch 2: "));
  }
}

TEST(PlannerTest, OfASampleTheFirstMicrobatchesCount) {
  const semu::Job job = *semu::JobFromProto(*semu::MakeSetup("vlm-s"));
  const auto planner = MakeStepPlanner();
  semu::Batch batch = LightBatch(64);
  batch.microbatches.resize(64, batch.microbatches[0]);
  std::vector<semu::Batch> samples(3, batch);
  PrepareOptions options;
  options.samples = samples;
  const auto first = planner->Prepare(job, std::nullopt, options);
  ASSERT_TRUE(first.ok()) << first.status();
  for (semu::Batch& sample : samples) {
    sample.microbatches.push_back(LightBatch(5000).microbatches[0]);
  }
  const auto longer = planner->Prepare(job, std::nullopt, options);
  ASSERT_TRUE(longer.ok()) << longer.status();
  EXPECT_EQ(semu::LayoutToProto((*first)->layout, job).SerializeAsString(),
            semu::LayoutToProto((*longer)->layout, job).SerializeAsString());
}

TEST(PlannerTest, WithoutSamplesManyRanksGetALayout) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.clear_edges();
  proto.mutable_modules()->DeleteSubrange(0, 1);
  v1::Module* text = proto.mutable_modules(0);
  text->mutable_layers()->DeleteSubrange(0, 1);
  text->mutable_layers()->DeleteSubrange(1, text->layers_size() - 1);
  v1::LayerGroup* layers = text->mutable_layers(0);
  layers->set_count(800);
  layers->set_hidden_size(64);
  layers->set_ffn_size(64);
  layers->set_heads(1);
  layers->set_kv_heads(1);
  proto.mutable_parallelism()->set_tensor_parallel(1);
  proto.mutable_parallelism()->set_pipeline_parallel(800);
  proto.clear_executor();
  proto.clear_max_microbatch_tokens();
  proto.add_max_microbatch_tokens(8);
  const semu::Job job = *semu::JobFromProto(proto);
  const auto prepared = MakeStepPlanner()->Prepare(job, std::nullopt, {});
  ASSERT_TRUE(prepared.ok()) << prepared.status();
  EXPECT_TRUE(
      semu::LayoutFromProto(semu::LayoutToProto((*prepared)->layout, job), job)
          .ok());
}

TEST(PlannerTest, BatchesMadeUpForAJobFailNoJob) {
  // One microbatch takes 4e17 ns, which 32 of them may not.
  semu::Job job = *semu::JobFromProto(*semu::MakeSetup("vlm-s"));
  for (semu::Module& module : job.modules) {
    module.layers = {module.layers[1]};
    module.layers[0].count = 2000;
  }
  PrepareOptions options;
  options.costs = std::make_shared<testing::SlowestCost>(/*backward=*/false);
  job.memory_budget_bytes = int64_t{1} << 50;
  const auto prepared = MakeStepPlanner()->Prepare(job, std::nullopt, options);
  EXPECT_TRUE(prepared.ok()) << prepared.status();
  const std::vector<semu::Batch> samples(3, LightBatch(64));
  options.samples = samples;
  EXPECT_THAT(std::string(MakeStepPlanner()
                              ->Prepare(job, std::nullopt, options)
                              .status()
                              .message()),
              HasSubstr("sample batch 0: "));
}

// A microbatch within the job's limits, each item consumed once and no longer
// than registration takes into account.
semu::Batch RandomMicrobatch(const semu::Job& job, const semu::Layout& layout,
                             std::mt19937_64& random) {
  const std::vector<int64_t>& buckets = job.executor.shape_buckets;
  semu::Batch batch;
  semu::Microbatch& microbatch = batch.microbatches.emplace_back();
  for (const int64_t tokens : job.max_microbatch_tokens) {
    std::vector<int64_t>& items = microbatch.item_tokens.emplace_back();
    const size_t m = microbatch.item_tokens.size() - 1;
    int64_t longest =
        std::min(tokens, 2 * layout.modules[m].sub_microbatch_tokens);
    if (!buckets.empty()) longest = std::min(longest, buckets.back());
    // Of about one length, which may be just over a bucket.
    int64_t length = 1 + static_cast<int64_t>(random() % longest);
    if (!buckets.empty() && random() % 2 == 0) {
      length = std::min(longest, buckets[random() % buckets.size()] + 1);
    }
    for (int64_t left = tokens; left > 0 && items.size() < 64;) {
      items.push_back(std::min(left, length));
      left -= items.back();
    }
  }
  for (const semu::ModuleEdge& edge : job.edges) {
    std::vector<semu::ItemUse>& uses = microbatch.uses.emplace_back();
    const size_t consumers = microbatch.item_tokens[edge.consumer].size();
    for (size_t i = 0; i < microbatch.item_tokens[edge.producer].size(); ++i) {
      uses.push_back(
          {static_cast<int>(i), static_cast<int>(std::min(i, consumers - 1))});
    }
  }
  return batch;
}

// With as little memory as it is accepted with.
TEST(PlannerTest, AnAcceptedJobHasASafePlanForEachMicrobatchWithinItsLimits) {
  const auto planner = MakeStepPlanner();
  std::mt19937_64 random(1);
  for (const char* setup : {"vlm-s", "t2v-s"}) {
    for (const std::vector<int64_t>& buckets :
         {std::vector<int64_t>{}, {1024, 2048, 4096, 8192}, {1024, 8192}}) {
      v1::Job proto = *semu::MakeSetup(setup);
      for (const int64_t bucket : buckets) {
        proto.mutable_executor()->add_shape_buckets(bucket);
      }
      for (int m = 0; m < proto.modules_size(); ++m) {
        proto.set_max_microbatch_tokens(m, 8192);
      }
      semu::Job job = *semu::JobFromProto(proto);
      const semu::Layout layout = *PlanLayout(job, semu::OpGraphCost());
      std::shared_ptr<const PlannableJob> accepted;
      int64_t refused = 0;
      for (int64_t fits = int64_t{80} << 30; fits - refused > fits / 1000;) {
        job.memory_budget_bytes =
            accepted == nullptr ? fits : refused + (fits - refused) / 2;
        auto prepared = planner->Prepare(job, layout, {});
        if (prepared.ok()) {
          fits = job.memory_budget_bytes;
          accepted = *std::move(prepared);
        } else {
          ASSERT_NE(accepted, nullptr) << prepared.status();
          refused = job.memory_budget_bytes;
        }
      }
      for (int i = 0; i < 40; ++i) {
        const semu::Batch batch = RandomMicrobatch(job, layout, random);
        const auto plan = planner->PlanSafe(*accepted, batch);
        EXPECT_TRUE(plan.ok())
            << setup << " with " << buckets.size() << " buckets, items of "
            << batch.microbatches[0].item_tokens[0][0] << " and "
            << batch.microbatches[0].item_tokens[1][0]
            << " tokens: " << plan.status();
      }
    }
  }
}

TEST(PlannerTest, BubblesAreThoseOfTheMakespanBesideThem) {
  for (const bool offload : {false, true}) {
    v1::Job proto = *semu::MakeSetup("vlm-s");
    // Slow, so that transfers contend; with offload, so little memory that
    // copies are waited for.
    for (v1::Link* link : {proto.mutable_links()->mutable_p2p_intra_node(),
                           proto.mutable_links()->mutable_p2p_inter_node()}) {
      link->set_bandwidth_bytes_per_second(300'000'000);
    }
    proto.mutable_executor()->set_offload(offload);
    if (offload) proto.set_memory_budget_bytes(int64_t{30} << 30);
    const semu::Job job = *semu::JobFromProto(proto);
    const auto planner = MakeStepPlanner();
    const auto prepared =
        planner->Prepare(job, *PlanLayout(job, semu::OpGraphCost()), {});
    ASSERT_TRUE(prepared.ok()) << prepared.status();
    const semu::Batch batch = *semu::BatchFromProto(
        *semu::SampleBatch(proto, {.microbatches = 8}), job);
    const auto plan = planner->Plan(**prepared, batch, Evaluations(20));
    ASSERT_TRUE(plan.ok()) << plan.status();
    const StepReport& report = plan->report;
    if (!offload) {
      EXPECT_GT(report.makespan_ns, report.schedule_makespan_ns);
    }
    double busy_ns = 0;
    for (const std::vector<Action>& program : plan->programs.ranks) {
      for (const Action& action : program) {
        if (IsCompute(action.kind)) busy_ns += action.end_ns - action.start_ns;
      }
    }
    const double all_ns = static_cast<double>(plan->programs.ranks.size()) *
                          static_cast<double>(report.makespan_ns);
    EXPECT_NEAR(report.bubble_ratio, 1 - busy_ns / all_ns, 1e-9);
    const BubbleCauses& causes = report.bubbles;
    EXPECT_NEAR(static_cast<double>(causes.imbalance_ns + causes.dependency_ns +
                                    causes.memory_ns + causes.transfer_ns),
                all_ns - busy_ns, 1);
  }
}

TEST(PlannerTest, ItemsMayBeInheritedWhereShapesAreFixed) {
  v1::Job proto = *semu::MakeSetup("omni");
  for (const int64_t bucket : {512, 1024, 2048}) {
    proto.mutable_executor()->add_shape_buckets(bucket);
  }
  const auto prepared =
      MakeStepPlanner()->Prepare(*semu::JobFromProto(proto), std::nullopt, {});
  EXPECT_TRUE(prepared.ok()) << prepared.status();
}

TEST(PlannerTest, SamplesMustFitAPinnedLayout) {
  const semu::Job job = *semu::JobFromProto(*semu::MakeSetup("vlm-s"));
  const semu::Layout layout = *PlanLayout(job, semu::OpGraphCost());
  const auto planner = MakeStepPlanner();
  std::vector<semu::Batch> samples(2, LightBatch(64));
  PrepareOptions options;
  options.samples = samples;
  EXPECT_TRUE(planner->Prepare(job, layout, options).ok());
  samples[1] = LightBatch(int64_t{1} << 24);
  const absl::Status status = planner->Prepare(job, layout, options).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("sample batch 1: "));
}

TEST(PlannerTest, AJobWhoseWeightsDoNotFitIsRefusedWithTheRank) {
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.set_memory_budget_bytes(int64_t{1} << 30);
  const absl::Status status =
      planner->Prepare(*semu::JobFromProto(proto), std::nullopt, {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("1073741824"));
}

}  // namespace
}  // namespace pipeweaver::search
