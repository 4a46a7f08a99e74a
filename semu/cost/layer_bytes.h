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
// residual stream's; what is gathered from the tensor-parallel GPUs for one
// matmul is not counted.
void SetLayerBytes(const Platform& platform, const LayerQuery& query,
                   LayerCost* cost);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_LAYER_BYTES_H_
