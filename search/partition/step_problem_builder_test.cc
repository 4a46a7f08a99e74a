// Step problems of all set-ups are well formed and feasible; dependencies,
// gradients and bytes are what the batch says.

#include "search/partition/step_problem_builder.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "search/partition/layout_planner.h"
#include "search/partition/memory_plan.h"
#include "search/partition/stage_cost.h"
#include "search/plan/safe_order.h"
#include "search/problem/problem_json.h"
#include "search/problem/problem_validation.h"
#include "search/strategy/worker_pool.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/cost/weight_memory.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

struct Planned {
  semu::Job job;
  semu::Layout layout;
  MemoryPlan memory;
};

Planned Prepare(const v1::Job& proto) {
  Planned planned;
  planned.job = *semu::JobFromProto(proto);
  planned.layout = *PlanLayout(planned.job, semu::OpGraphCost());
  planned.memory =
      *PlanMemory(planned.job, planned.layout, semu::OpGraphCost());
  return planned;
}

Planned Prepare(const char* name) { return Prepare(*semu::MakeSetup(name)); }

StepProblem Build(const Planned& planned, const semu::Batch& batch,
                  const StepProblemOptions& options = {}) {
  absl::StatusOr<StepProblem> step = BuildStepProblem(
      planned.job, planned.layout, planned.memory.activation_limit_bytes, batch,
      semu::OpGraphCost(), options);
  EXPECT_TRUE(step.ok()) << step.status();
  return *std::move(step);
}

int SweepNamed(const StepProblem& step, const std::string& id) {
  for (size_t i = 0; i < step.problem.sweeps.size(); ++i) {
    if (step.problem.sweeps[i].id == id) return static_cast<int>(i);
  }
  ADD_FAILURE() << "no sweep " << id;
  return 0;
}

TEST(StepProblemBuilderTest, ThreadsChangeNothing) {
  for (const char* name : {"vlm-s", "t2v-s"}) {
    SCOPED_TRACE(name);
    const v1::Job proto = *semu::MakeSetup(name);
    const Planned planned = Prepare(proto);
    const semu::Batch batch = *semu::BatchFromProto(
        *semu::SampleBatch(proto, {.seed = 5, .microbatches = 24}),
        planned.job);
    const StepProblem alone = Build(planned, batch);
    WorkerPool pool(3);
    StepProblemOptions options;
    options.pool = &pool;
    const StepProblem shared = Build(planned, batch, options);
    EXPECT_EQ(ProblemToJson(shared.problem), ProblemToJson(alone.problem));
    EXPECT_EQ(shared.output_bytes, alone.output_bytes);
    EXPECT_EQ(shared.after_bytes, alone.after_bytes);
    EXPECT_EQ(shared.shapes, alone.shapes);
    EXPECT_EQ(shared.empty, alone.empty);
    EXPECT_EQ(shared.measured_share, alone.measured_share);
    ASSERT_EQ(shared.sweeps.size(), alone.sweeps.size());
    for (size_t i = 0; i < alone.sweeps.size(); ++i) {
      EXPECT_EQ(shared.sweeps[i].sub_microbatch,
                alone.sweeps[i].sub_microbatch);
      EXPECT_EQ(shared.sweeps[i].segment, alone.sweeps[i].segment);
    }
  }
}

TEST(StepProblemBuilderTest, EverySetupFitsAndIsWellFormed) {
  for (const std::string& name : semu::SetupNames()) {
    SCOPED_TRACE(name);
    const v1::Job proto = *semu::MakeSetup(name);
    const Planned planned = Prepare(proto);
    const absl::StatusOr<semu::Layout> layout = semu::LayoutFromProto(
        semu::LayoutToProto(planned.layout, planned.job), planned.job);
    EXPECT_TRUE(layout.ok()) << layout.status();
    for (const bool forward_only : {false, true}) {
      v1::BatchMetadata metadata =
          *semu::SampleBatch(proto, {.seed = 3, .microbatches = 16});
      metadata.set_forward_only(forward_only);
      const semu::Batch batch = *semu::BatchFromProto(metadata, planned.job);
      const StepProblem step = Build(planned, batch);
      EXPECT_TRUE(ValidateProblem(step.problem).ok())
          << ValidateProblem(step.problem);
      EXPECT_TRUE(SafeOrder(step.problem).ok())
          << SafeOrder(step.problem).status();
      EXPECT_EQ(step.sweeps.size(), step.problem.sweeps.size());
      EXPECT_EQ(step.output_bytes.size(), step.problem.sweeps.size());
      EXPECT_EQ(step.after_bytes.size(), step.problem.sweeps.size());
      EXPECT_EQ(step.measured_share, 0);
      for (size_t i = 0; i < step.sweeps.size(); ++i) {
        const Sweep& sweep = step.problem.sweeps[i];
        const SubMicrobatch& sub =
            step.sub_microbatches[step.sweeps[i].sub_microbatch];
        const auto& chunks = planned.layout.modules[sub.module]
                                 .segments[step.sweeps[i].segment]
                                 .chunks;
        ASSERT_EQ(sweep.stages.size(), chunks.size());
        EXPECT_EQ(step.after_bytes[i].size(), sweep.after.size());
        EXPECT_EQ(sweep.microbatch, sub.microbatch);
        for (size_t c = 0; c < chunks.size(); ++c) {
          EXPECT_EQ(sweep.stages[c].rank, chunks[c].rank);
          EXPECT_EQ(sweep.stages[c].choices.size(),
                    step.choices[sub.module][step.sweeps[i].segment][c].size());
          EXPECT_LE(sweep.stages[c].choices.size(), 10u);
          for (const Choice& choice : sweep.stages[c].choices) {
            if (forward_only) {
              EXPECT_EQ(choice.input_grad_ns, 0);
            }
            EXPECT_EQ(choice.fused_backward_ns.has_value(),
                      step.problem.split_backward && choice.weight_grad_ns > 0);
          }
        }
      }
    }
  }
}

// Two microbatches of vlm-s: one with three images of one sample and two
// samples more, one with text alone.
semu::Batch SmallBatch(const semu::Job& job) {
  v1::BatchMetadata metadata;
  v1::Microbatch* microbatch = metadata.add_microbatches();
  v1::ModuleItems* vision = microbatch->add_items();
  vision->set_module(0);
  for (int n : {2704, 2704, 1352}) vision->add_tokens(n);
  v1::ModuleItems* text = microbatch->add_items();
  text->set_module(1);
  for (int n : {1000, 500, 500}) text->add_tokens(n);
  v1::ItemUses* uses = microbatch->add_uses();
  for (int i : {0, 1, 2}) {
    uses->add_producer_item(i);
    uses->add_consumer_item(0);
  }
  v1::ModuleItems* plain = metadata.add_microbatches()->add_items();
  plain->set_module(1);
  plain->add_tokens(4000);
  return *semu::BatchFromProto(metadata, job);
}

TEST(StepProblemBuilderTest, DependenciesFollowItemsAndSegments) {
  Planned planned = Prepare("vlm-s");
  planned.layout.modules[0].sub_microbatch_tokens = 2704;
  planned.layout.modules[1].sub_microbatch_tokens = 1000;
  LayoutShape shape;
  shape.modules = {{2704, 1, {false}}, {1000, 2, {false, true}}};
  planned.layout =
      PlaceLayers(planned.job, shape,
                  *MeanLayerTimes(planned.job, SmallBatch(planned.job),
                                  semu::OpGraphCost()));
  const StepProblem step = Build(planned, SmallBatch(planned.job));

  // 6760 tokens of images in 3 sub-microbatches; 2000 of text in 2.
  const int consumer = SweepNamed(step, "mb0/backbone/0/s0");
  const Sweep& sweep = step.problem.sweeps[consumer];
  EXPECT_THAT(sweep.after, ElementsAre(SweepNamed(step, "mb0/vision/0/s0"),
                                       SweepNamed(step, "mb0/vision/1/s0"),
                                       SweepNamed(step, "mb0/vision/2/s0")));
  // Merged tokens of bf16 vectors, over 4 GPUs.
  EXPECT_THAT(step.after_bytes[consumer],
              ElementsAre(169 * 1792 / 4 * 2, 169 * 1792 / 4 * 2,
                          (1352 + 15) / 16 * 1792 / 4 * 2));
  EXPECT_THAT(step.problem.sweeps[SweepNamed(step, "mb0/backbone/1/s0")].after,
              IsEmpty());
  const int second = SweepNamed(step, "mb0/backbone/0/s1");
  EXPECT_THAT(step.problem.sweeps[second].after, ElementsAre(consumer));
  EXPECT_EQ(step.problem.sweeps[second].stages.front().rank, 3);
  // The second segment starts on the rank on which the first ends.
  EXPECT_EQ(sweep.stages.back().transfer_ns, 0);
  EXPECT_GT(step.problem.sweeps[SweepNamed(step, "mb0/vision/0/s0")]
                .stages.back()
                .transfer_ns,
            0);
  EXPECT_THAT(step.empty, ElementsAre(std::pair(1, 0)));
}

TEST(StepProblemBuilderTest, FrozenEncodersHaveNoBackward) {
  const Planned planned = Prepare("vlm-s-frozen");
  const StepProblem step = Build(planned, SmallBatch(planned.job));
  for (size_t i = 0; i < step.sweeps.size(); ++i) {
    const int module =
        step.sub_microbatches[step.sweeps[i].sub_microbatch].module;
    EXPECT_EQ(step.problem.sweeps[i].backward, module == 1);
  }
}

TEST(StepProblemBuilderTest, FrozenBehindTrainedPassesGradientsOn) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_modules(1)->set_frozen(true);
  const Planned planned = Prepare(proto);
  const StepProblem step = Build(planned, SmallBatch(planned.job));
  const Sweep& sweep =
      step.problem.sweeps[SweepNamed(step, "mb0/backbone/0/s0")];
  EXPECT_TRUE(sweep.backward);
  for (const Stage& stage : sweep.stages) {
    EXPECT_EQ(stage.choices[0].weight_grad_ns, 0);
    EXPECT_GT(stage.choices[0].input_grad_ns, 0);
    EXPECT_FALSE(stage.choices[0].fused_backward_ns.has_value());
  }
}

TEST(StepProblemBuilderTest, ForwardOnlyHasNoBackward) {
  const Planned planned = Prepare("vlm-s");
  semu::Batch batch = SmallBatch(planned.job);
  batch.forward_only = true;
  const StepProblem step = Build(planned, batch);
  EXPECT_FALSE(step.problem.split_backward);
  for (const Sweep& sweep : step.problem.sweeps) EXPECT_FALSE(sweep.backward);
}

TEST(StepProblemBuilderTest, ExecutorsAreTakenAtTheirWord) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_executor()->set_split_backward(false);
  proto.mutable_executor()->set_selective_recompute(false);
  Planned planned = Prepare(proto);
  planned.memory.activation_limit_bytes.assign(4, int64_t{1} << 30);
  const StepProblem step = Build(planned, SmallBatch(planned.job));
  EXPECT_FALSE(step.problem.split_backward);
  for (const auto& segments : step.choices) {
    for (const auto& chunks : segments) {
      for (const auto& choices : chunks) {
        EXPECT_GT(choices.size(), 1u);
        for (const MemoryChoice& choice : choices) {
          EXPECT_EQ(choice.selective_recompute_layers, 0);
          EXPECT_EQ(choice.offload_layers, 0);
        }
      }
    }
  }
}

TEST(StepProblemBuilderTest, ChoicesOnlyWhereMemoryIsShort) {
  Planned planned = Prepare("vlm-s");
  planned.memory.activation_limit_bytes = {int64_t{1} << 50, 1 << 30,
                                           int64_t{1} << 50, int64_t{1} << 50};
  const StepProblem step = Build(planned, SmallBatch(planned.job));
  const auto& chunks = step.choices[1][0];
  EXPECT_EQ(chunks[0].size(), 1u);
  EXPECT_GT(chunks[1].size(), 2u);
  const auto& choices =
      step.problem.sweeps[SweepNamed(step, "mb0/backbone/0/s0")]
          .stages[1]
          .choices;
  EXPECT_EQ(choices.name(0), "keep");
  EXPECT_EQ(choices.name(choices.size() - 1), "full");
  for (size_t i = 1; i < choices.size(); ++i) {
    EXPECT_LE(choices[i].activation_bytes, choices[i - 1].activation_bytes);
    EXPECT_GE(choices[i].input_grad_ns, choices[i - 1].input_grad_ns);
  }
}

TEST(StepProblemBuilderTest, WhatIsOffloadedIsBackWhenTheBackwardBegins) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_executor()->set_offload(true);
  // As slow as if computing took no time.
  proto.mutable_links()->mutable_host()->set_bandwidth_bytes_per_second(
      1'000'000'000);
  const Planned planned = Prepare(proto);
  const semu::Batch batch = SmallBatch(planned.job);
  const StepProblem keep =
      Build(planned, batch, {.strategy = semu::MemoryStrategy::kKeep});
  const StepProblem offload =
      Build(planned, batch, {.strategy = semu::MemoryStrategy::kOffload});
  for (size_t s = 0; s < keep.problem.sweeps.size(); ++s) {
    const SweepOrigin& origin = offload.sweeps[s];
    const int module = offload.sub_microbatches[origin.sub_microbatch].module;
    for (size_t k = 0; k < keep.problem.sweeps[s].stages.size(); ++k) {
      const Choice& kept = keep.problem.sweeps[s].stages[k].choices[0];
      const Choice& out = offload.problem.sweeps[s].stages[k].choices[0];
      const MemoryChoice& choice =
          offload.choices[module][origin.segment][k][0];
      EXPECT_EQ(out.activation_bytes, 0);
      EXPECT_GE(choice.offload_bytes, kept.activation_bytes);
      EXPECT_EQ(out.backward_bytes, kept.backward_bytes);
      EXPECT_EQ(out.fused_backward_bytes, kept.fused_backward_bytes);
      // It takes longer for the copies alone.
      EXPECT_GT(out.forward_copy_wait_ns, 0);
      EXPECT_EQ(out.forward_ns - out.forward_copy_wait_ns, kept.forward_ns);
      EXPECT_EQ(out.input_grad_ns - out.input_grad_copy_wait_ns,
                kept.input_grad_ns);
      if (!kept.fused_backward_ns.has_value()) continue;
      EXPECT_EQ(*out.fused_backward_ns - out.backward_copy_wait_ns,
                *kept.fused_backward_ns);
    }
  }
}

// However B_m cuts microbatches, an item is never cut.
TEST(StepProblemBuilderTest, LongItemsHaveMoreSetAside) {
  Planned planned = Prepare("vlm-s");
  v1::BatchMetadata metadata;
  v1::ModuleItems* text = metadata.add_microbatches()->add_items();
  text->set_module(1);
  text->add_tokens(8192);
  const semu::Batch batch = *semu::BatchFromProto(metadata, planned.job);
  std::vector<int64_t> reserve;
  for (const int64_t tokens : {256, 3072, 8192}) {
    planned.layout.modules[0].sub_microbatch_tokens = 256;
    planned.layout.modules[1].sub_microbatch_tokens = tokens;
    planned.memory =
        *PlanMemory(planned.job, planned.layout, semu::OpGraphCost());
    const StepProblem step =
        Build(planned, batch,
              {.layer_reserve_bytes = planned.memory.layer_reserve_bytes});
    const int64_t extra =
        step.extra_reserve_bytes.empty() ? 0 : step.extra_reserve_bytes[3];
    reserve.push_back(planned.memory.layer_reserve_bytes[3] + extra);
    EXPECT_EQ(step.problem.memory_limit_bytes[3],
              planned.memory.activation_limit_bytes[3] - extra);
  }
  EXPECT_THAT(reserve, ElementsAre(reserve[2], reserve[2], reserve[2]));
}

TEST(StepProblemBuilderTest, RefusesWhatOverflows) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_device()->set_peak_flops_per_second(1'000'000);
  const Planned planned = Prepare(proto);
  const semu::Batch batch = *semu::BatchFromProto(
      *semu::SampleBatch(proto, {.microbatches = 4096}), planned.job);
  const absl::Status status =
      BuildStepProblem(planned.job, planned.layout,
                       planned.memory.activation_limit_bytes, batch,
                       semu::OpGraphCost())
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("out of proportion"));
}

// Where nothing is recomputed, the reserve is transfers and one operand
// gathered for a matmul.
TEST(MemoryPlanTest, KeepsRoomForAGatheredOperand) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.mutable_executor()->set_selective_recompute(false);
  proto.mutable_executor()->set_full_recompute(false);
  proto.mutable_executor()->set_offload(false);
  const semu::Job job = *semu::JobFromProto(proto);
  const semu::Layout layout = *PlanLayout(job, semu::OpGraphCost());
  const MemoryPlan plan = *PlanMemory(job, layout, semu::OpGraphCost());
  std::vector<int64_t> weights(plan.static_bytes.size(), 0);
  std::vector<int64_t> gathered(plan.static_bytes.size(), 0);
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const int64_t tokens = std::min(2 * layout.modules[m].sub_microbatch_tokens,
                                    job.max_microbatch_tokens[m]);
    for (const semu::PipelineSegment& segment : layout.modules[m].segments) {
      for (const semu::Chunk& chunk : segment.chunks) {
        for (const LayerRun& run : RunsOf(job.modules[m], chunk)) {
          const semu::LayerSpec& layer = job.modules[m].layers[run.group].layer;
          weights[chunk.rank] +=
              run.count * semu::WeightMemoryOf(job, layer, true).Total();
          if (layer.kind == semu::LayerKind::kPatchEmbed) continue;
          gathered[chunk.rank] =
              std::max(gathered[chunk.rank], tokens * layer.hidden_size * 2);
        }
      }
    }
  }
  for (size_t r = 0; r < weights.size(); ++r) {
    EXPECT_GT(gathered[r], 0);
    EXPECT_EQ(plan.static_bytes[r],
              weights[r] + plan.transfer_bytes + gathered[r]);
  }
}

TEST(MemoryPlanTest, NamesTheRankThatIsTooSmall) {
  v1::Job proto = *semu::MakeSetup("vlm-s");
  proto.set_memory_budget_bytes(int64_t{8} << 30);
  const semu::Job job = *semu::JobFromProto(proto);
  const absl::Status status =
      PlanMemory(job, *PlanLayout(job, semu::OpGraphCost()),
                 semu::OpGraphCost())
          .status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(status.message(), HasSubstr("rank 0 needs "));
  EXPECT_THAT(status.message(), HasSubstr("memory_budget_bytes = 8589934592"));
}

}  // namespace
}  // namespace pipeweaver::search
