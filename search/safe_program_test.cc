// The planner's safe programs of whole jobs, as vectors that its twin in
// client_agents/python is tested on: bytes of every choice, and every rank's
// order.
//
// To write the vectors anew:
//   PIPEWEAVER_UPDATE=$PWD/search/testdata/safe_program.json
//       bazel-bin/search/safe_program_test
// (on one line), then look at the difference.

#include <google/protobuf/util/json_util.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "search/partition/layout_planner.h"
#include "search/planner.h"
#include "search/testing/golden_file.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"

namespace pipeweaver::search {
namespace {

using Json = nlohmann::ordered_json;

constexpr char kVectors[] = "search/testdata/safe_program.json";

struct Case {
  std::string setup;
  int microbatches = 2;
  bool tight = false;  // the least memory that it fits in, about
  void (*change)(v1::Job& job) = nullptr;
  bool forward_only = false;
};

Json ToJson(const google::protobuf::Message& message) {
  std::string text;
  EXPECT_TRUE(google::protobuf::util::MessageToJsonString(message, &text).ok());
  return Json::parse(text);
}

// "kind sub-microbatch/segment/chunk choice" of each stage.
std::string OrderOf(const StepPlan& plan, int rank) {
  std::vector<std::string> order;
  for (const ScheduledStage& s : plan.schedule.ranks[rank]) {
    const auto& sweep = plan.step.sweeps[s.sweep];
    const int module = plan.step.sub_microbatches[sweep.sub_microbatch].module;
    order.push_back(absl::StrCat(
        std::string(1, StageKindLetter(s.kind)), " ", sweep.sub_microbatch, "/",
        sweep.segment, "/", s.stage, " ",
        plan.step.choices[module][sweep.segment][s.stage][s.choice].name));
  }
  return absl::StrJoin(order, ", ");
}

// Activation, backward, weight gradient and fused backward of each choice.
std::string BytesOf(const Stage& stage) {
  std::vector<std::string> bytes;
  for (const Choice& c : stage.choices) {
    bytes.push_back(absl::StrCat(
        c.activation_bytes, " ", c.backward_bytes, " ", c.weight_grad_bytes,
        " ", c.fused_backward_ns.has_value() ? c.fused_backward_bytes : -1));
  }
  return absl::StrJoin(bytes, ", ");
}

// Without what long items have set aside.
std::vector<int64_t> GivenLimits(const StepProblem& step) {
  std::vector<int64_t> limits = step.problem.memory_limit_bytes;
  for (size_t r = 0; r < step.extra_reserve_bytes.size(); ++r) {
    limits[r] += step.extra_reserve_bytes[r];
  }
  return limits;
}

// The layout is that of a fixed rule, so that no search has a say in the
// vector.
Json VectorOf(const Case& c, const StepPlanner& planner) {
  v1::Job proto = *semu::MakeSetup(c.setup);
  const semu::Layout layout =
      *PlanLayout(*semu::JobFromProto(proto), semu::OpGraphCost());
  if (c.change != nullptr) c.change(proto);
  const semu::Job job = *semu::JobFromProto(proto);
  const auto prepared = planner.Prepare(job, layout, {});
  EXPECT_TRUE(prepared.ok()) << c.setup << ": " << prepared.status();
  if (!prepared.ok()) return {};
  *proto.mutable_layout() = semu::LayoutToProto((*prepared)->layout, job);
  semu::SampleOptions sample;
  sample.microbatches = c.microbatches;
  sample.max_images = 12;
  v1::BatchMetadata batch_proto = *semu::SampleBatch(proto, sample);
  batch_proto.set_forward_only(c.forward_only);
  const semu::Batch batch = *semu::BatchFromProto(batch_proto, job);

  PlannableJob limited = **prepared;
  absl::StatusOr<StepPlan> plan = planner.PlanSafe(limited, batch);
  EXPECT_TRUE(plan.ok()) << plan.status();
  while (c.tight) {
    for (int64_t& bytes : limited.activation_limit_bytes) {
      bytes = bytes / 8 * 7;
    }
    absl::StatusOr<StepPlan> tighter = planner.PlanSafe(limited, batch);
    if (!tighter.ok()) break;
    plan = std::move(tighter);
  }

  Json vector = {{"job", ToJson(proto)},
                 {"batch", ToJson(batch_proto)},
                 {"memory_limit_bytes", GivenLimits(plan->step)},
                 {"bytes", Json::array()},
                 {"ranks", Json::array()}};
  for (const Sweep& sweep : plan->step.problem.sweeps) {
    Json stages = Json::array();
    for (const Stage& stage : sweep.stages) stages.push_back(BytesOf(stage));
    vector["bytes"].push_back(std::move(stages));
  }
  for (int rank = 0; rank < plan->step.problem.ranks; ++rank) {
    vector["ranks"].push_back(OrderOf(*plan, rank));
  }
  return vector;
}

TEST(SafeProgramTest, EqualsTheVectors) {
  const Case cases[] = {
      {"vlm-s", 6},
      {"vlm-s", 6, /*tight=*/true,
       [](v1::Job& job) {
         job.mutable_executor()->set_split_backward(true);
         job.mutable_executor()->set_offload(true);
       }},
      {"vlm-s", 3, /*tight=*/true,
       [](v1::Job& job) {
         job.mutable_modules(0)->set_frozen(true);
         job.mutable_executor()->set_offload(false);
       }},
      {"vlm-s", 3, /*tight=*/true,
       [](v1::Job& job) {
         job.mutable_modules(1)->set_frozen(true);
         job.mutable_executor()->set_offload(false);
       }},
      {"vlm-s", 3, /*tight=*/true,
       [](v1::Job& job) {
         job.mutable_executor()->Clear();
         job.mutable_executor()->set_selective_recompute(true);
         for (const int64_t tokens : {1024, 4096, 10240, 20480, 131072}) {
           job.mutable_executor()->add_shape_buckets(tokens);
         }
         job.set_max_microbatch_tokens(0, 64'896);
         job.set_data_type(v1::DATA_TYPE_FP32);
       }},
      {"t2v-s", 4},
      {"t2v-s", 4, /*tight=*/true,
       [](v1::Job& job) {
         job.mutable_parallelism()->set_context_parallel(2);
         job.mutable_executor()->set_split_backward(true);
       }},
      {"omni", 3},
      {"omni", 3, /*tight=*/true},
      {"omni", 2, /*tight=*/false, nullptr, /*forward_only=*/true},
  };
  const std::unique_ptr<StepPlanner> planner = MakeStepPlanner();
  std::string vectors = "[\n";
  for (const Case& c : cases) {
    if (vectors.size() > 2) vectors += ",\n";
    vectors += VectorOf(c, *planner).dump();
  }
  vectors += "\n]\n";
  EXPECT_EQ(testing::GoldenText(kVectors, vectors), vectors)
      << kVectors << " differs";
}

}  // namespace
}  // namespace pipeweaver::search
