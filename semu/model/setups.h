// The public set-ups that benchmarks, the demo and `pipeweaverctl setups` use:
// models, parallelism and devices as published (arXiv 2504.14145).

#ifndef SEMU_MODEL_SETUPS_H_
#define SEMU_MODEL_SETUPS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pipeweaver/v1/job.pb.h"

namespace pipeweaver::semu {

// Names, in the order of reports: each set-up, then its "-frozen" variant, in
// which the encoders are not trained.
std::vector<std::string> SetupNames();

// The job of a set-up, named after it, without a layout. NOT_FOUND for a name
// that is not in SetupNames().
absl::StatusOr<v1::Job> MakeSetup(absl::string_view name);

// What sample batches must know of a set-up (semu/model/sample_batches.h):
// indices into Job.modules and Job.edges, -1 where it has none.
struct SetupRoles {
  int vision = -1;
  int audio = -1;
  int text = -1;   // the backbone, or the text encoder of a diffusion model
  int video = -1;  // the diffusion transformer
  int vision_to_text = -1;
  int audio_to_text = -1;
  int text_to_video = -1;
};

// Roles of the modules of a job whose shape is that of a set-up: at most one
// module of each modality. INVALID_ARGUMENT for any other job.
absl::StatusOr<SetupRoles> RolesOf(const v1::Job& job);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_SETUPS_H_
