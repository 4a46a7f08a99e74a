// The module graph of a job, walked: order of execution, neighbours, and what
// needs a backward.

#ifndef SEMU_MODEL_MODULE_GRAPH_H_
#define SEMU_MODEL_MODULE_GRAPH_H_

#include <vector>

#include "semu/model/job.h"

namespace pipeweaver::semu {

// Modules in an order in which producers come before consumers; among the ready
// ones the lowest index first. Shorter than job.modules if the graph has a
// circle: the modules on or behind it are missing.
std::vector<int> TopologicalOrder(const Job& job);

// The edge over which a module without modality receives its items; -1 for a
// module with a modality. REQUIRES: a validated job.
int InheritedEdge(const Job& job, int module);

// What the backward pass computes for each module of a validated job.
struct ModuleGradients {
  // The module is trained: its layers have weight gradients.
  std::vector<bool> weight;
  // Something trainable stands upstream: its layers pass gradients on.
  std::vector<bool> input;

  bool Backward(int module) const { return weight[module] || input[module]; }
};
ModuleGradients RequiredGradients(const Job& job);

// True if the module computes a loss of its own (it has an output head), so
// that its items need not be consumed.
bool HasLoss(const Module& module);

// True if the module's tokens reach its layers as a condition (a diffusion
// transformer): tokens consumed are not part of its items' own tokens.
bool IsConditioned(const Module& module);

}  // namespace pipeweaver::semu

#endif  // SEMU_MODEL_MODULE_GRAPH_H_
