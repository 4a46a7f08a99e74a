// Every rule of batch metadata, broken one at a time.

#include "semu/model/batch_proto.h"

#include <cstdint>
#include <functional>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// omni: modules vision 0, audio 1, audio-projector 2, backbone 3, dit 4; edges
// vision -> backbone 0, audio -> projector 1, projector -> backbone 2,
// backbone -> dit 3.
Job Omni() { return *JobFromProto(*MakeSetup("omni")); }

v1::BatchMetadata GoodBatch() {
  v1::BatchMetadata batch;
  v1::Microbatch* microbatch = batch.add_microbatches();
  v1::ModuleItems* vision = microbatch->add_items();
  vision->set_module(0);
  vision->add_height(728);
  vision->add_width(728);
  vision->add_height(15);
  vision->add_width(1);
  v1::ModuleItems* audio = microbatch->add_items();
  audio->set_module(1);
  audio->add_tokens(401);
  v1::ModuleItems* text = microbatch->add_items();
  text->set_module(3);
  text->add_tokens(1000);
  text->add_tokens(500);
  v1::ModuleItems* video = microbatch->add_items();
  video->set_module(4);
  video->add_height(768);
  video->add_width(768);
  video->add_frames(12);
  v1::ItemUses* images = microbatch->add_uses();
  images->set_edge(0);
  images->add_producer_item(0);
  images->add_consumer_item(0);
  images->add_producer_item(1);
  images->add_consumer_item(1);
  v1::ItemUses* speech = microbatch->add_uses();
  speech->set_edge(2);
  speech->add_producer_item(0);
  speech->add_consumer_item(1);
  v1::ItemUses* condition = microbatch->add_uses();
  condition->set_edge(3);
  condition->add_producer_item(0);
  condition->add_consumer_item(0);
  return batch;
}

TEST(BatchFromProtoTest, FillsInGridAndInheritedItems) {
  const absl::StatusOr<Batch> batch = BatchFromProto(GoodBatch(), Omni());
  ASSERT_TRUE(batch.ok()) << batch.status();
  const Microbatch& microbatch = batch->microbatches[0];
  EXPECT_THAT(microbatch.item_tokens[0], ElementsAre(2704, 2));
  EXPECT_THAT(microbatch.item_tokens[1], ElementsAre(401));
  EXPECT_THAT(microbatch.item_tokens[2], ElementsAre(101));
  EXPECT_THAT(microbatch.item_tokens[4], ElementsAre(48 * 48 * 2));
  ASSERT_EQ(microbatch.uses[1].size(), 1u);
  EXPECT_EQ(microbatch.uses[1][0].producer_item, 0);
}

TEST(BatchFromProtoTest, ItemsFitTheLargestShapeBucket) {
  v1::Job proto = *MakeSetup("omni");
  for (const int64_t tokens : {512, 4608}) {
    proto.mutable_executor()->add_shape_buckets(tokens);
  }
  const Job job = *JobFromProto(proto);
  EXPECT_TRUE(BatchFromProto(GoodBatch(), job).ok());
  v1::BatchMetadata batch = GoodBatch();
  batch.mutable_microbatches(0)->mutable_items(2)->set_tokens(0, 4609);
  const auto refused = BatchFromProto(batch, job);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("microbatches[0] item 0 of module \"backbone\" has "
                        "4609 tokens: must be at most the largest of "
                        "executor.shape_buckets, 4608"));
}

TEST(SampleBatchesFromProtoTest, CountsItemsOfAll) {
  v1::BatchMetadata many;
  for (int b = 0; b < 10; ++b) {
    v1::ModuleItems* text = many.add_microbatches()->add_items();
    text->set_module(3);
    text->mutable_tokens()->Resize(60'000, 1);
  }
  // The items of all lie within what one batch may have, or not.
  google::protobuf::RepeatedPtrField<v1::BatchMetadata> samples;
  *samples.Add() = many;
  const auto one = SampleBatchesFromProto(samples, Omni());
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_EQ((*one)[0].microbatches.size(), 10);
  for (int b = 0; b < kSampleMicrobatches; ++b) samples[0].add_microbatches();
  const auto cut = SampleBatchesFromProto(samples, Omni());
  ASSERT_TRUE(cut.ok()) << cut.status();
  EXPECT_EQ((*cut)[0].microbatches.size(), kSampleMicrobatches);
  *samples.Add() = many;
  const auto two = SampleBatchesFromProto(samples, Omni());
  EXPECT_EQ(two.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(two.status().message()),
      HasSubstr("1200000 items up to sample_batches[1]: must be at most "
                "1048576"));
}

TEST(BatchToProtoTest, MakesTheSameValueAgain) {
  v1::BatchMetadata proto = GoodBatch();
  proto.add_microbatches();
  proto.set_forward_only(true);
  const Batch batch = *BatchFromProto(proto, Omni());
  const v1::BatchMetadata written = BatchToProto(batch, Omni());
  EXPECT_EQ(written.microbatches(0).items_size(), 4);
  EXPECT_EQ(written.microbatches(0).uses_size(), 3);
  const auto read = BatchFromProto(written, Omni());
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->microbatches, batch.microbatches);
  EXPECT_TRUE(read->forward_only);
}

TEST(BatchFromProtoTest, ModulesMayBeEmpty) {
  v1::BatchMetadata proto;
  proto.set_forward_only(true);
  v1::ModuleItems* text = proto.add_microbatches()->add_items();
  text->set_module(3);
  text->add_tokens(1);
  proto.add_microbatches();
  const absl::StatusOr<Batch> batch = BatchFromProto(proto, Omni());
  ASSERT_TRUE(batch.ok()) << batch.status();
  EXPECT_TRUE(batch->forward_only);
  EXPECT_TRUE(batch->microbatches[1].item_tokens[3].empty());
}

struct BadBatch {
  const char* name;
  std::function<void(v1::BatchMetadata*)> spoil;
  const char* message;
};

class BadBatchTest : public ::testing::TestWithParam<BadBatch> {};

TEST_P(BadBatchTest, IsRefused) {
  v1::BatchMetadata proto = GoodBatch();
  GetParam().spoil(&proto);
  const absl::Status status = BatchFromProto(proto, Omni()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr(GetParam().message));
}

v1::Microbatch* First(v1::BatchMetadata* batch) {
  return batch->mutable_microbatches(0);
}

INSTANTIATE_TEST_SUITE_P(
    Rules, BadBatchTest,
    ::testing::Values(
        BadBatch{"NoMicrobatches",
                 [](v1::BatchMetadata* b) { b->clear_microbatches(); },
                 "number of microbatches is 0: must be 1 to 4096"},
        BadBatch{"TooManyMicrobatches",
                 [](v1::BatchMetadata* b) {
                   for (int i = 0; i < 4096; ++i) b->add_microbatches();
                 },
                 "number of microbatches is 4097"},
        BadBatch{"NothingAtAll",
                 [](v1::BatchMetadata* b) { First(b)->Clear(); },
                 "microbatches have 0 items"},
        BadBatch{"UnknownModule",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(0)->set_module(5);
                 },
                 "microbatches[0].items[0].module is 5: the job has 5 modules"},
        BadBatch{"ModuleTwice",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(1)->set_module(0);
                 },
                 "microbatches[0].items[1].module is 0: a module is listed "
                 "once"},
        BadBatch{"ItemsOfAProjector",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(1)->set_module(2);
                 },
                 "has no modality"},
        BadBatch{"TokensAndSizes",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(0)->add_tokens(3);
                 },
                 "not both"},
        BadBatch{"ZeroTokens",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(2)->set_tokens(1, 0);
                 },
                 "microbatches[0].items[2].tokens[1] is 0"},
        BadBatch{"TooManyTokens",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(2)->set_tokens(1, 4000000000u);
                 },
                 "has more than 67108864 tokens with item 1"},
        BadBatch{"SizesWithoutAGrid",
                 [](v1::BatchMetadata* b) {
                   v1::ModuleItems* audio = First(b)->mutable_items(1);
                   audio->clear_tokens();
                   audio->add_height(3);
                   audio->add_width(3);
                 },
                 "has no token_grid"},
        BadBatch{"WidthMissing",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(0)->mutable_width()->RemoveLast();
                 },
                 "microbatches[0].items[0].width has 1 values"},
        BadBatch{"FramesTooMany",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(3)->add_frames(3);
                 },
                 "microbatches[0].items[3].frames has 2 values"},
        BadBatch{"ZeroHeight",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(0)->set_height(1, 0);
                 },
                 "item 1 has height 0, width 1"},
        BadBatch{"PixelsOverflow",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(3)->set_height(0, 4294967295u);
                   First(b)->mutable_items(3)->set_width(0, 4294967295u);
                   First(b)->mutable_items(3)->set_frames(0, 4294967295u);
                 },
                 "must make at most 67108864 tokens"},
        BadBatch{"TooManyItems",
                 [](v1::BatchMetadata* b) {
                   for (int i = 0; i < 65536; ++i) {
                     First(b)->mutable_items(2)->add_tokens(1);
                   }
                 },
                 "microbatches[0].items[2] has 65538 items: must have at most "
                 "65536"},
        BadBatch{"TooManyItemsInAll",
                 [](v1::BatchMetadata* b) {
                   v1::Microbatch many;
                   many.add_items()->set_module(3);
                   for (int i = 0; i < 65536; ++i) {
                     many.mutable_items(0)->add_tokens(1);
                   }
                   for (int i = 0; i < 16; ++i) *b->add_microbatches() = many;
                 },
                 "up to microbatches[16]"},
        BadBatch{"UnknownEdge",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_uses(0)->set_edge(4);
                 },
                 "microbatches[0].uses[0].edge is 4: the job has 4 edges"},
        BadBatch{"EdgeTwice",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_uses(1)->set_edge(0);
                 },
                 "microbatches[0].uses[1].edge is 0: an edge is listed once"},
        BadBatch{"UsesOfAProjector",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_uses(1)->set_edge(1);
                 },
                 "one for one"},
        BadBatch{"ColumnsDiffer",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_uses(0)->add_producer_item(0);
                 },
                 "microbatches[0].uses[0].consumer_item has 2 values: must "
                 "have as many as producer_item, 3"},
        BadBatch{"ProducerPastTheEnd",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_uses(0)->set_producer_item(1, 2);
                 },
                 "microbatches[0].uses[0].producer_item[1] is 2: the producer "
                 "has 2 items"},
        BadBatch{"ConsumerPastTheEnd",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_uses(0)->set_consumer_item(1, 4294967295u);
                 },
                 "consumer_item[1] is 4294967295"},
        BadBatch{"PairTwice",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_uses(0)->add_producer_item(0);
                   First(b)->mutable_uses(0)->add_consumer_item(0);
                 },
                 "uses producer item 0 for consumer item 0 twice"},
        BadBatch{
            "ImageForNobody",
            [](v1::BatchMetadata* b) {
              First(b)->mutable_uses(0)->mutable_producer_item()->RemoveLast();
              First(b)->mutable_uses(0)->mutable_consumer_item()->RemoveLast();
            },
            "name item 1 of module \"vision\" on no edge"},
        BadBatch{"ConsumesMoreThanItHas",
                 [](v1::BatchMetadata* b) {
                   First(b)->mutable_items(2)->set_tokens(0, 168);
                 },
                 "item 0 of module \"backbone\" has 168 tokens and consumes "
                 "169"}),
    [](const ::testing::TestParamInfo<BadBatch>& info) {
      return info.param.name;
    });

TEST(BatchFromProtoTest, AFrozenEncodersItemsMustBeConsumedToo) {
  v1::BatchMetadata proto = GoodBatch();
  proto.mutable_microbatches(0)->mutable_uses()->RemoveLast();
  const Job frozen = *JobFromProto(*MakeSetup("omni-frozen"));
  // The backbone has a loss, so that nothing need consume its items.
  EXPECT_TRUE(BatchFromProto(proto, frozen).ok());
  proto.mutable_microbatches(0)->mutable_uses()->RemoveLast();
  EXPECT_THAT(BatchFromProto(proto, frozen).status().message(),
              HasSubstr("item 0 of module \"audio-projector\" on no edge"));
}

// An empty microbatch takes as many vectors as the job has modules and edges.
TEST(HeldBytesTest, CountsWhatIsEmpty) {
  const Job job = Omni();
  v1::BatchMetadata proto = GoodBatch();
  const int64_t one = HeldBytes(*BatchFromProto(proto, job));
  for (int i = 0; i < 1000; ++i) proto.add_microbatches();
  EXPECT_GE(
      HeldBytes(*BatchFromProto(proto, job)) - one,
      1000 * static_cast<int64_t>(sizeof(Microbatch) +
                                  (job.modules.size() + job.edges.size()) *
                                      sizeof(std::vector<int64_t>)));
}

}  // namespace
}  // namespace pipeweaver::semu
