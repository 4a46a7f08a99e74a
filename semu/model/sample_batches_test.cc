// Sample batches are valid, bounded, the same every time, and look as they
// should.

#include "semu/model/sample_batches.h"

#include <cstdint>
#include <numeric>

#include "gtest/gtest.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

TEST(SampleBatchTest, EverySetupGetsValidBatches) {
  for (const std::string& name : SetupNames()) {
    const v1::Job proto = *MakeSetup(name);
    const Job job = *JobFromProto(proto);
    for (uint64_t seed = 1; seed <= 5; ++seed) {
      const auto metadata = SampleBatch(proto, {.seed = seed});
      ASSERT_TRUE(metadata.ok()) << name << metadata.status();
      const auto batch = BatchFromProto(*metadata, job);
      ASSERT_TRUE(batch.ok())
          << name << " seed " << seed << ": " << batch.status();
      EXPECT_EQ(batch->microbatches.size(), 64u);
      for (const Microbatch& microbatch : batch->microbatches) {
        for (size_t m = 0; m < job.modules.size(); ++m) {
          const std::vector<int64_t>& tokens = microbatch.item_tokens[m];
          EXPECT_LE(std::accumulate(tokens.begin(), tokens.end(), int64_t{0}),
                    job.max_microbatch_tokens[m])
              << name << " " << job.modules[m].name;
        }
      }
    }
  }
}

TEST(SampleBatchTest, SameSeedSameBatch) {
  const v1::Job job = *MakeSetup("omni");
  const auto bytes = [&job](uint64_t seed) {
    return SampleBatch(job, {.seed = seed})->SerializeAsString();
  };
  EXPECT_EQ(bytes(7), bytes(7));
  EXPECT_NE(bytes(7), bytes(8));
}

TEST(SampleBatchTest, MicrobatchesAreFullAndVary) {
  const v1::Job job = *MakeSetup("vlm-s");
  const v1::BatchMetadata batch = *SampleBatch(job, {});
  int64_t tokens = 0;
  int least = 48;
  int most = 0;
  for (const v1::Microbatch& microbatch : batch.microbatches()) {
    int images = 0;
    for (const v1::ModuleItems& items : microbatch.items()) {
      images += items.height_size();
      tokens =
          std::accumulate(items.tokens().begin(), items.tokens().end(), tokens);
    }
    least = std::min(least, images);
    most = std::max(most, images);
  }
  EXPECT_GT(tokens, 64 * 8192 * 8 / 10);
  EXPECT_LE(most, 48);
  EXPECT_GT(most - least, 10);
}

TEST(SampleBatchTest, TraceBoundsHold) {
  const v1::Job job = *MakeSetup("vlm-s");
  for (int step = 1; step <= 40; ++step) {
    SampleOptions options = {.seed = static_cast<uint64_t>(step),
                             .microbatches = 16};
    SetTraceBounds(step, &options);
    const v1::BatchMetadata batch = *SampleBatch(job, options);
    for (const v1::Microbatch& microbatch : batch.microbatches()) {
      int images = 0;
      for (const v1::ModuleItems& items : microbatch.items()) {
        images += items.height_size();
      }
      EXPECT_GE(images, options.min_images) << "step " << step;
      EXPECT_LE(images, options.max_images) << "step " << step;
    }
  }
  SampleOptions options;
  SetTraceBounds(5, &options);
  EXPECT_EQ(options.min_images, 16);
  EXPECT_EQ(options.max_images, 32);
  SetTraceBounds(20, &options);
  EXPECT_EQ(options.max_images, 0);
}

TEST(SampleBatchTest, RefusesOptionsOutOfRange) {
  const v1::Job job = *MakeSetup("vlm-s");
  EXPECT_FALSE(SampleBatch(job, {.microbatches = 0}).ok());
  EXPECT_FALSE(SampleBatch(job, {.microbatches = 4097}).ok());
  EXPECT_FALSE(SampleBatch(job, {.min_images = 9, .max_images = 8}).ok());
  EXPECT_FALSE(SampleBatch(job, {.max_images = 49}).ok());
}

TEST(SampleBatchTest, RefusesPixelsWithoutATokenGrid) {
  v1::Job images = *MakeSetup("vlm-s");
  images.mutable_modules(0)->clear_token_grid();
  EXPECT_EQ(
      SampleBatch(images, {}).status(),
      absl::InvalidArgumentError(
          "modules[0].token_grid has pixels_per_token_height = 0 and "
          "pixels_per_token_width = 0: must both be at least 1, for samples "
          "are drawn in pixels"));
  v1::Job video = *MakeSetup("t2v-s");
  video.mutable_modules(1)->clear_token_grid();
  EXPECT_EQ(SampleBatch(video, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace pipeweaver::semu
