// Parameters times bytes, divided by the GPUs that share them.

#include "semu/cost/weight_memory.h"

#include "semu/model/layer_size.h"

namespace pipeweaver::semu {

WeightMemory WeightMemoryOf(const Job& job, const LayerSpec& layer,
                            bool trained) {
  const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t parameters =
      ceil_div(ParameterCount(layer), job.parallelism.tensor_parallel);
  const int64_t shards =
      int64_t{job.parallelism.data_parallel} * job.parallelism.context_parallel;
  const int64_t optimizer = job.data_type == DataType::kFp32 ? 8 : 12;
  WeightMemory memory;
  memory.weight_bytes = parameters * DataTypeBytes(job.data_type);
  if (!trained) return memory;
  const bool states = job.optimizer_sharding != OptimizerSharding::kNone;
  const bool gradients =
      job.optimizer_sharding == OptimizerSharding::kStatesAndGradients;
  memory.gradient_bytes = ceil_div(parameters, gradients ? shards : 1) * 4;
  memory.optimizer_bytes =
      ceil_div(parameters, states ? shards : 1) * optimizer;
  return memory;
}

}  // namespace pipeweaver::semu
