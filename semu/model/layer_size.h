// Sizes of a layer that follow from its shape alone.

#ifndef SEMU_MODEL_LAYER_SIZE_H_
#define SEMU_MODEL_LAYER_SIZE_H_

#include <cstdint>

#include "semu/model/job.h"

namespace pipeweaver::semu {

// Weights of one layer over all its GPUs. Biases are left out: they are under
// 0.1 % of any layer here. A kDit layer counts its cross-attention; the matrix
// that makes the modulation is shared by all layers (MovieGen, PixArt's
// adaLN-single) and left out.
int64_t ParameterCount(const LayerSpec& layer);

// Width of the keys (or values) of one token.
int64_t KeyValueWidth(const LayerSpec& layer);

// Width of the layer's output; a kLmHead ends in the loss and hands on its
// input.
int64_t OutputWidth(const LayerSpec& layer);

// Width of what the module hands to the next module.
int64_t OutputWidth(const Module& module);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_LAYER_SIZE_H_
