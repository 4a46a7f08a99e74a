// See step_problem.h.

#include "search/partition/step_problem.h"

#include <algorithm>

namespace pipeweaver::search {

std::optional<int64_t> MostOffloadBytes(const StepProblem& step) {
  std::optional<int64_t> most;
  for (const auto& module : step.choices) {
    for (const auto& segment : module) {
      for (const auto& chunk : segment) {
        for (const MemoryChoice& choice : chunk) {
          if (choice.offload_layers == 0) continue;
          most = std::max(most.value_or(0), choice.offload_bytes);
        }
      }
    }
  }
  return most;
}

}  // namespace pipeweaver::search
