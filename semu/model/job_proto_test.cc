// Every rule of jobs and layouts, broken one at a time.

#include "semu/model/job_proto.h"

#include <cstdint>
#include <functional>
#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

using ::testing::HasSubstr;

v1::Job VlmS() { return *MakeSetup("vlm-s"); }

TEST(JobFromProtoTest, ReadsEverySetup) {
  EXPECT_EQ(SetupNames().size(), 18u);
  for (const std::string& name : SetupNames()) {
    const auto proto = MakeSetup(name);
    ASSERT_TRUE(proto.ok()) << name;
    const absl::StatusOr<Job> job = JobFromProto(*proto);
    ASSERT_TRUE(job.ok()) << name << ": " << job.status();
    EXPECT_EQ(job->name, name);
    EXPECT_EQ(job->modules.size(), proto->modules_size());
    EXPECT_TRUE(RolesOf(*proto).ok()) << RolesOf(*proto).status();
  }
  EXPECT_EQ(MakeSetup("vlm-t").status().code(), absl::StatusCode::kNotFound);
}

TEST(JobFromProtoTest, FillsInDefaults) {
  v1::Job proto = VlmS();
  proto.mutable_modules(0)->mutable_layers(1)->set_kv_heads(0);
  proto.mutable_parallelism()->clear_tensor_parallel();
  proto.mutable_executor()->clear_max_segments();
  proto.clear_max_microbatch_tokens();
  proto.mutable_device()->set_memory_bytes(1000);
  const absl::StatusOr<Job> job = JobFromProto(proto);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->modules[0].layers[1].layer.kv_heads, 16);
  EXPECT_EQ(job->parallelism.tensor_parallel, 1);
  EXPECT_EQ(job->executor.max_segments, 4);
  EXPECT_EQ(job->max_microbatch_tokens[1], 8192);
  EXPECT_EQ(job->memory_budget_bytes, 940);
}

struct BadJob {
  const char* name;
  std::function<void(v1::Job*)> spoil;
  const char* message;
};

class BadJobTest : public ::testing::TestWithParam<BadJob> {};

TEST_P(BadJobTest, IsRefused) {
  v1::Job proto = VlmS();
  GetParam().spoil(&proto);
  const absl::Status status = JobFromProto(proto).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(GetParam().message));
}

v1::LayerGroup* VitLayers(v1::Job* job) {
  return job->mutable_modules(0)->mutable_layers(1);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, BadJobTest,
    ::testing::Values(
        BadJob{"EmptyName", [](v1::Job* j) { j->clear_name(); }, "name is \"\""},
        BadJob{"NameWithSlash", [](v1::Job* j) { j->set_name("a/b"); },
               "name is \"a/b\": must be 1 to 63"},
        BadJob{"NameTooLong",
               [](v1::Job* j) { j->set_name(std::string(64, 'a')); },
               "must be 1 to 63"},
        BadJob{"NoModules", [](v1::Job* j) { j->clear_modules(); },
               "number of modules is 0: must be 1 to 64"},
        BadJob{"TooManyModules",
               [](v1::Job* j) {
                 for (int i = 0; i < 64; ++i) {
                   *j->add_modules() = j->modules(0);
                   j->mutable_modules(i + 2)->set_name("m" + std::to_string(i));
                 }
               },
               "number of modules is 66"},
        BadJob{"DuplicateModule",
               [](v1::Job* j) { j->mutable_modules(1)->set_name("vision"); },
               "modules[1].name is \"vision\": must be unique"},
        BadJob{"UnknownModality",
               [](v1::Job* j) {
                 j->mutable_modules(0)->set_modality(
                     static_cast<v1::Modality>(99));
               },
               "modules[0].modality is 99"},
        BadJob{"NoLayers",
               [](v1::Job* j) { j->mutable_modules(0)->clear_layers(); },
               "number of modules[0].layers is 0"},
        BadJob{"LayerKindUnset",
               [](v1::Job* j) { VitLayers(j)->clear_kind(); },
               "modules[0].layers[1].kind is 0"},
        BadJob{"NegativeCount",
               [](v1::Job* j) { VitLayers(j)->set_count(-1); },
               "modules[0].layers[1].count is -1: must be 1 to 4096"},
        BadJob{"ZeroHidden",
               [](v1::Job* j) { VitLayers(j)->set_hidden_size(0); },
               "modules[0].layers[1].hidden_size is 0"},
        BadJob{"HiddenOverflows",
               [](v1::Job* j) {
                 VitLayers(j)->set_hidden_size(
                     std::numeric_limits<int64_t>::max());
               },
               "hidden_size is 9223372036854775807: must be 1 to"},
        BadJob{"NegativeFfn",
               [](v1::Job* j) { VitLayers(j)->set_ffn_size(-4); },
               "modules[0].layers[1].ffn_size is -4"},
        BadJob{"HeadsDoNotDivide",
               [](v1::Job* j) { VitLayers(j)->set_heads(15); },
               "modules[0].layers[1].heads is 15: must divide"},
        BadJob{"KvHeadsDoNotDivide",
               [](v1::Job* j) { VitLayers(j)->set_kv_heads(3); },
               "modules[0].layers[1].kv_heads is 3: must divide"},
        BadJob{"EmbeddingWithoutVocabulary",
               [](v1::Job* j) {
                 j->mutable_modules(1)->mutable_layers(0)->clear_vocab_size();
               },
               "modules[1].layers[0].vocab_size is 0"},
        BadJob{"PatchEmbedWithoutInput",
               [](v1::Job* j) {
                 j->mutable_modules(0)->mutable_layers(0)->clear_input_size();
               },
               "modules[0].layers[0].input_size is 0"},
        BadJob{"WidthsDoNotMeet",
               [](v1::Job* j) { VitLayers(j)->set_hidden_size(1808); },
               "modules[0].layers[1].hidden_size is 1808: must be the output "
               "width of the layers before it, 1792"},
        BadJob{"EmbeddingInTheMiddle",
               [](v1::Job* j) {
                 *j->mutable_modules(1)->add_layers() = j->modules(1).layers(0);
               },
               "modules[1].layers[3].kind"},
        BadJob{"TooManyParameters",
               [](v1::Job* j) {
                 v1::LayerGroup* group = VitLayers(j);
                 group->set_count(4000);
                 group->set_ffn_size(1 << 24);
                 group->set_hidden_size(1 << 24);
                 j->mutable_modules(0)->mutable_layers(0)->set_hidden_size(
                     1 << 24);
               },
               "parameters: must be at most"},
        BadJob{"HalfATokenGrid",
               [](v1::Job* j) {
                 j->mutable_modules(0)
                     ->mutable_token_grid()
                     ->clear_pixels_per_token_width();
               },
               "modules[0].token_grid has pixels_per_token_height = 14"},
        BadJob{"NegativeFramesPerToken",
               [](v1::Job* j) {
                 j->mutable_modules(0)
                     ->mutable_token_grid()
                     ->set_frames_per_token(-1);
               },
               "modules[0].token_grid.frames_per_token is -1"},
        BadJob{"EdgeToNowhere",
               [](v1::Job* j) { j->mutable_edges(0)->set_consumer("x"); },
               "edges[0].consumer is \"x\": must name a module"},
        BadJob{"RepeatedEdge",
               [](v1::Job* j) { *j->add_edges() = j->edges(0); },
               "edges[1] repeats edges[0]"},
        BadJob{"Circle",
               [](v1::Job* j) {
                 v1::ModuleEdge* edge = j->add_edges();
                 edge->set_producer("backbone");
                 edge->set_consumer("vision");
               },
               "edges form a circle through module"},
        BadJob{"SelfEdge",
               [](v1::Job* j) {
                 j->mutable_edges(0)->set_producer("backbone");
               },
               "edges form a circle through module \"backbone\""},
        BadJob{"CircleAheadOfAnotherModule",
               [](v1::Job* j) {
                 *j->add_modules() = j->modules(0);
                 j->mutable_modules(2)->set_name("third");
                 v1::ModuleEdge* edge = j->add_edges();
                 edge->set_producer("third");
                 edge->set_consumer("third");
               },
               "edges form a circle through module \"third\""},
        BadJob{"NegativeMerge",
               [](v1::Job* j) { j->mutable_edges(0)->set_tokens_merged(-2); },
               "edges[0].tokens_merged is -2"},
        BadJob{"NothingFeedsIt",
               [](v1::Job* j) { j->mutable_modules(0)->clear_modality(); },
               "modules[0] \"vision\" has no modality and 0 producers"},
        BadJob{"NoRanks",
               [](v1::Job* j) {
                 j->mutable_parallelism()->clear_pipeline_parallel();
               },
               "parallelism.pipeline_parallel is 0: must be 1 to 4096"},
        BadJob{"NegativeTensorParallel",
               [](v1::Job* j) {
                 j->mutable_parallelism()->set_tensor_parallel(-8);
               },
               "parallelism.tensor_parallel is -8"},
        BadJob{"UnknownDataType",
               [](v1::Job* j) { j->set_data_type(static_cast<v1::DataType>(9)); },
               "data_type is 9"},
        BadJob{"UnknownSharding",
               [](v1::Job* j) {
                 j->set_optimizer_sharding(
                     static_cast<v1::OptimizerSharding>(9));
               },
               "optimizer_sharding is 9"},
        BadJob{"NoPeak",
               [](v1::Job* j) {
                 j->mutable_device()->clear_peak_flops_per_second();
               },
               "device.peak_flops_per_second is 0"},
        BadJob{"NoDeviceMemory",
               [](v1::Job* j) { j->mutable_device()->set_memory_bytes(0); },
               "device.memory_bytes is 0"},
        BadJob{"NegativeLatency",
               [](v1::Job* j) {
                 j->mutable_links()->mutable_p2p_inter_node()->set_latency_ns(
                     -1);
               },
               "links.p2p_inter_node.latency_ns is -1"},
        BadJob{"NoBandwidth",
               [](v1::Job* j) {
                 j->mutable_links()->clear_p2p_intra_node();
               },
               "links.p2p_intra_node.bandwidth_bytes_per_second is 0"},
        BadJob{"OffloadWithoutHostLink",
               [](v1::Job* j) {
                 j->mutable_executor()->set_offload(true);
                 j->mutable_links()->clear_host();
               },
               "links.host.bandwidth_bytes_per_second is 0"},
        BadJob{"BudgetPastDevice",
               [](v1::Job* j) {
                 j->set_memory_budget_bytes(int64_t{1} << 60);
               },
               "memory_budget_bytes is 1152921504606846976"},
        BadJob{"NegativeReceives",
               [](v1::Job* j) {
                 j->mutable_executor()->set_max_receives_ahead(-1);
               },
               "executor.max_receives_ahead is -1"},
        BadJob{"TooManySegments",
               [](v1::Job* j) { j->mutable_executor()->set_max_segments(65); },
               "executor.max_segments is 65"},
        BadJob{"BucketsNotAscending",
               [](v1::Job* j) {
                 j->mutable_executor()->add_shape_buckets(8);
                 j->mutable_executor()->add_shape_buckets(8);
               },
               "executor.shape_buckets[1] is 8: must be more than"},
        BadJob{"BucketsFarTooSmall",
               [](v1::Job* j) {
                 j->mutable_executor()->add_shape_buckets(1);
                 j->set_max_microbatch_tokens(1, 8192);
               },
               ": must be at most 4096 times the largest of "
               "executor.shape_buckets, 1"},
        BadJob{"LimitsForSomeModules",
               [](v1::Job* j) {
                 j->clear_max_microbatch_tokens();
                 j->add_max_microbatch_tokens(1);
               },
               "max_microbatch_tokens has 1 values"},
        BadJob{"NegativeLimit",
               [](v1::Job* j) { j->set_max_microbatch_tokens(1, -5); },
               "max_microbatch_tokens[1] is -5"}),
    [](const ::testing::TestParamInfo<BadJob>& info) {
      return info.param.name;
    });

// vlm-s on 4 ranks: vision (64 layers) in one segment, backbone (34) in two.
v1::Layout GoodLayout() {
  v1::Layout layout;
  v1::ModuleLayout* vision = layout.add_modules();
  vision->set_module("vision");
  vision->set_sub_microbatch_tokens(20000);
  v1::PipelineSegment* segment = vision->add_segments();
  for (int r = 0; r < 4; ++r) {
    v1::Chunk* chunk = segment->add_chunks();
    chunk->set_rank(r);
    chunk->set_first_layer(r * 16);
    chunk->set_num_layers(16);
  }
  v1::ModuleLayout* backbone = layout.add_modules();
  backbone->set_module("backbone");
  backbone->set_sub_microbatch_tokens(8192);
  int next = 0;
  for (int s = 0; s < 2; ++s) {
    v1::PipelineSegment* down = backbone->add_segments();
    for (int r = 0; r < 4; ++r) {
      v1::Chunk* chunk = down->add_chunks();
      chunk->set_rank(s == 0 ? r : 3 - r);
      chunk->set_first_layer(next);
      chunk->set_num_layers(s == 0 && r == 0 ? 6 : 4);
      next += chunk->num_layers();
    }
  }
  return layout;
}

TEST(LayoutFromProtoTest, RoundTrip) {
  const Job job = *JobFromProto(VlmS());
  const absl::StatusOr<Layout> layout = LayoutFromProto(GoodLayout(), job);
  ASSERT_TRUE(layout.ok()) << layout.status();
  EXPECT_EQ(LayoutToProto(*layout, job).SerializeAsString(),
            GoodLayout().SerializeAsString());
}

TEST(LayoutFromProtoTest, NeedsTheCapabilityForAV) {
  v1::Job proto = VlmS();
  proto.mutable_executor()->set_v_placement(false);
  const absl::Status status =
      LayoutFromProto(GoodLayout(), *JobFromProto(proto)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(),
              HasSubstr("layout.modules[1].segments[1].chunks[1].rank is 2"));
}

struct BadLayout {
  const char* name;
  std::function<void(v1::Layout*)> spoil;
  const char* message;
};

class BadLayoutTest : public ::testing::TestWithParam<BadLayout> {};

TEST_P(BadLayoutTest, IsRefused) {
  v1::Layout layout = GoodLayout();
  GetParam().spoil(&layout);
  const absl::Status status =
      LayoutFromProto(layout, *JobFromProto(VlmS())).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(GetParam().message));
}

v1::Chunk* VisionChunk(v1::Layout* layout, int chunk) {
  return layout->mutable_modules(0)->mutable_segments(0)->mutable_chunks(chunk);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, BadLayoutTest,
    ::testing::Values(
        BadLayout{"ModuleMissing",
                  [](v1::Layout* l) { l->mutable_modules()->RemoveLast(); },
                  "layout.modules has 1 entries"},
        BadLayout{
            "ModulesSwapped",
            [](v1::Layout* l) { l->mutable_modules()->SwapElements(0, 1); },
            "layout.modules[0].module is \"backbone\": must be"},
        BadLayout{
            "NoSegments",
            [](v1::Layout* l) { l->mutable_modules(0)->clear_segments(); },
            "number of layout.modules[0].segments is 0"},
        BadLayout{"TooManySegments",
                  [](v1::Layout* l) {
                    for (int i = 0; i < 4; ++i) {
                      *l->mutable_modules(0)->add_segments() =
                          l->modules(0).segments(0);
                    }
                  },
                  "segments is 5: must be 1 to 4"},
        BadLayout{"NoChunks",
                  [](v1::Layout* l) {
                    l->mutable_modules(0)->mutable_segments(0)->clear_chunks();
                  },
                  "number of layout.modules[0].segments[0].chunks is 0"},
        BadLayout{"RankPastTheEnd",
                  [](v1::Layout* l) { VisionChunk(l, 3)->set_rank(4); },
                  "layout.modules[0].segments[0].chunks[3].rank is 4: must be "
                  "0 to 3"},
        BadLayout{"NegativeRank",
                  [](v1::Layout* l) { VisionChunk(l, 0)->set_rank(-1); },
                  "chunks[0].rank is -1"},
        BadLayout{"RankTwice",
                  [](v1::Layout* l) { VisionChunk(l, 1)->set_rank(0); },
                  "chunks[1].rank is 0 after 0: ranks of a segment must be "
                  "distinct"},
        BadLayout{"ZigZag",
                  [](v1::Layout* l) {
                    VisionChunk(l, 1)->set_rank(2);
                    VisionChunk(l, 2)->set_rank(1);
                  },
                  "chunks[2].rank is 1 after 2"},
        BadLayout{"LayerTwice",
                  [](v1::Layout* l) { VisionChunk(l, 1)->set_first_layer(15); },
                  "chunks[1].first_layer is 15: must be 16"},
        BadLayout{"LayersMissing",
                  [](v1::Layout* l) { VisionChunk(l, 3)->set_num_layers(15); },
                  "layout.modules[0].segments hold 63 layers: must hold all "
                  "64"},
        BadLayout{"NegativeLayers",
                  [](v1::Layout* l) { VisionChunk(l, 0)->set_num_layers(-1); },
                  "chunks[0].num_layers is -1"},
        BadLayout{"TooManyLayers",
                  [](v1::Layout* l) { VisionChunk(l, 3)->set_num_layers(17); },
                  "chunks[3].num_layers is 17: must be 0 to 16"},
        BadLayout{"NoTokens",
                  [](v1::Layout* l) {
                    l->mutable_modules(1)->set_sub_microbatch_tokens(0);
                  },
                  "layout.modules[1].sub_microbatch_tokens is 0"}),
    [](const ::testing::TestParamInfo<BadLayout>& info) {
      return info.param.name;
    });

}  // namespace
}  // namespace pipeweaver::semu
