// Bytes that a layer's weights, gradients and optimizer states take on a GPU.

#ifndef SEMU_COST_WEIGHT_MEMORY_H_
#define SEMU_COST_WEIGHT_MEMORY_H_

#include <cstdint>

#include "semu/model/job.h"

namespace pipeweaver::semu {

struct WeightMemory {
  int64_t weight_bytes = 0;
  int64_t gradient_bytes = 0;
  int64_t optimizer_bytes = 0;

  int64_t Total() const {
    return weight_bytes + gradient_bytes + optimizer_bytes;
  }
};

// Of one layer on one GPU, as Megatron-LM's mixed precision holds them: weights
// in the job's data type, gradients in fp32, Adam's master weights and two
// moments in fp32 (12 bytes a parameter; 8 where the weights are fp32
// themselves). Divided by tensor parallelism, and by data times context
// parallelism as the job's optimizer sharding says. A layer that is not trained
// has weights only.
WeightMemory WeightMemoryOf(const Job& job, const LayerSpec& layer,
                            bool trained);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_WEIGHT_MEMORY_H_
