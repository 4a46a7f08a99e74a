// A profile's layer points as the measured cost model takes them.

#ifndef SEMU_COST_MEASURED_PROFILE_LAYERS_H_
#define SEMU_COST_MEASURED_PROFILE_LAYERS_H_

#include <vector>

#include "pipeweaver/v1/profile.pb.h"
#include "semu/cost/measured/measured_cost.h"
#include "semu/model/job.h"

namespace pipeweaver::semu {

// The points of `profile` that name a layer of `job`: module by name, layer by
// its kind in lower case without the enum's prefix ("transformer", "dit",
// "embedding", "lm_head", "patch_embed", "projector"). A point's median is
// taken. Parallelism not given is the job's, and tokens whose items are not
// given are of one item, or of equal ones. Left out are points of other modules
// or parallelism, since a profile may serve several jobs, those without tokens
// or time, and those of a kind of which the module has unlike layers.
// REQUIRES: the profile is valid (profile_file.h).
std::vector<MeasuredLayer> MeasuredLayersOf(const v1::Profile& profile,
                                            const Job& job);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_MEASURED_PROFILE_LAYERS_H_
