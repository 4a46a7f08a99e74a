// Draws batch metadata for a set-up from quantiles of real samples
// (sample_quantiles.inc names the sources).

#ifndef SEMU_MODEL_SAMPLE_BATCHES_H_
#define SEMU_MODEL_SAMPLE_BATCHES_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/batch.pb.h"
#include "pipeweaver/v1/job.pb.h"

namespace pipeweaver::semu {

struct SampleOptions {
  uint64_t seed = 1;
  int microbatches = 64;  // 1 .. 4096
  // Images of a microbatch, of jobs with a vision module: 0 <= min <= max
  // <= 48.
  int min_images = 0;
  int max_images = 48;
};

// The batch of a step, the same for the same job and options on any machine.
//
// Vision-language jobs: images scaled to 728 px on the
// longer side; captioned images, questions, interleaved documents and plain
// conversations packed into microbatches of at most 8192 tokens of the text
// module. Where min_images asks for it, samples without images wait. Video
// jobs: up to 8 clips and 16 s a microbatch at 16 FPS and about 768 x 768 px,
// and their prompts. A job with all modalities: the former, every fifth sample
// with speech, and up to 4 clips and 8 s made from samples of the microbatch.
//
// Errors: INVALID_ARGUMENT for options out of range, a job that RolesOf
// (setups.h) refuses, or one whose vision or video module has no token_grid.
absl::StatusOr<v1::BatchMetadata> SampleBatch(const v1::Job& job,
                                              const SampleOptions& options);

// Bounds of images for a step (from 1) of the dynamic trace: the lower one
// rises 0 -> 16 over steps 1-5 below an upper one of 32, then both fall to 0 by
// step 20; after 20 steps again.
void SetTraceBounds(int step, SampleOptions* options);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_SAMPLE_BATCHES_H_
