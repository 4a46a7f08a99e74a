// Kahn's algorithm, and reachability along the resulting order.

#include "semu/model/module_graph.h"

#include <algorithm>

#include "semu/base/check.h"

namespace pipeweaver::semu {

std::vector<int> TopologicalOrder(const Job& job) {
  const int n = static_cast<int>(job.modules.size());
  std::vector<int> producers_left(n, 0);
  for (const ModuleEdge& edge : job.edges) ++producers_left[edge.consumer];
  std::vector<bool> placed(n, false);
  std::vector<int> order;
  order.reserve(n);
  for (;;) {
    int next = 0;
    while (next < n && (placed[next] || producers_left[next] > 0)) ++next;
    if (next == n) return order;
    placed[next] = true;
    order.push_back(next);
    for (const ModuleEdge& edge : job.edges) {
      if (edge.producer == next) --producers_left[edge.consumer];
    }
  }
}

int InheritedEdge(const Job& job, int module) {
  if (job.modules[module].modality != Modality::kInherited) return -1;
  for (size_t e = 0; e < job.edges.size(); ++e) {
    if (job.edges[e].consumer == module) return static_cast<int>(e);
  }
  PW_CHECK(false && "a validated job feeds every module");
}

ModuleGradients RequiredGradients(const Job& job) {
  const size_t n = job.modules.size();
  ModuleGradients gradients;
  gradients.weight.resize(n);
  gradients.input.resize(n, false);
  for (size_t m = 0; m < n; ++m) gradients.weight[m] = !job.modules[m].frozen;
  for (int m : TopologicalOrder(job)) {
    for (const ModuleEdge& edge : job.edges) {
      if (edge.consumer == m && gradients.Backward(edge.producer)) {
        gradients.input[m] = true;
      }
    }
  }
  return gradients;
}

bool HasLoss(const Module& module) {
  return std::any_of(module.layers.begin(), module.layers.end(),
                     [](const LayerGroup& group) {
                       return group.layer.kind == LayerKind::kLmHead;
                     });
}

bool IsConditioned(const Module& module) {
  return std::any_of(module.layers.begin(), module.layers.end(),
                     [](const LayerGroup& group) {
                       return group.layer.kind == LayerKind::kDit;
                     });
}

}  // namespace pipeweaver::semu
