// The part of a job that costs depend on.

#include "semu/cost/cost_model.h"

namespace pipeweaver::semu {

Platform PlatformOf(const Job& job) {
  return {job.parallelism, job.data_type, job.device, job.links};
}

}  // namespace pipeweaver::semu
