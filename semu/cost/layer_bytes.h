// Bytes of a layer by closed rules, exact and quick to count anywhere: the
// trainer's agent counts the same (client_agents/python/pipeweaver/memory.py),
// since its safe program must be the planner's.

#ifndef SEMU_COST_LAYER_BYTES_H_
#define SEMU_COST_LAYER_BYTES_H_

#include "semu/cost/cost_model.h"

namespace pipeweaver::semu {

// Fills in every figure of `cost` that is in bytes; 0 .. 10^14, per GPU.
//
// Kept, rebuilt and weight gradient's bytes are those of the layer's graph
// (graph/layer_expander.h), in fractions of tokens where sizes do not divide.
// The workspace of a block is the feed-forward part's gradients and two of the
// residual stream's; GatheredBytes is not counted.
void SetLayerBytes(const Platform& platform, const LayerQuery& query,
                   LayerCost* cost);

// The largest operand that one matmul of the layer gathers from the
// tensor-parallel GPUs, or whose sum it scatters to them, whatever the pass; 0
// .. 10^14, per GPU. A rank runs one matmul at a time, so it needs room for one
// such operand beyond all that SetLayerBytes counts.
int64_t GatheredBytes(const Platform& platform, const LayerQuery& query);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_LAYER_BYTES_H_
