#include "search/plan/schedule_timeline.h"

#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace pipeweaver::search {
namespace {

// The timeline's index of a sweep's module.
int ModuleOf(const Sweep& sweep, std::vector<std::string>& modules) {
  const std::vector<std::string> parts = absl::StrSplit(sweep.id, '/');
  std::string name = parts.size() >= 2 ? parts[1] : "stages";
  const size_t dot = name.rfind('.');
  if (dot != std::string::npos && dot + 1 < name.size() &&
      name.find_first_not_of("0123456789", dot + 1) == std::string::npos) {
    name.resize(dot);
  }
  const auto it = std::find(modules.begin(), modules.end(), name);
  if (it != modules.end()) return static_cast<int>(it - modules.begin());
  modules.push_back(name);
  return static_cast<int>(modules.size()) - 1;
}

}  // namespace

semu::Timeline ScheduleTimeline(const Problem& problem,
                                const Schedule& schedule,
                                const StageTimes& times) {
  semu::Timeline timeline;
  timeline.ranks = problem.ranks;
  timeline.memory_limit_bytes = problem.memory_limit_bytes;
  timeline.memory.resize(problem.ranks);
  std::vector<int> modules;
  // [sweep][stage]: spans of its forward and of its B or I.
  std::vector<std::vector<int>> forward(problem.sweeps.size());
  std::vector<std::vector<int>> gradient(problem.sweeps.size());
  for (size_t s = 0; s < problem.sweeps.size(); ++s) {
    modules.push_back(ModuleOf(problem.sweeps[s], timeline.modules));
    forward[s].assign(problem.sweeps[s].stages.size(), -1);
    gradient[s].assign(problem.sweeps[s].stages.size(), -1);
  }
  for (int r = 0; r < problem.ranks; ++r) {
    int64_t live = 0;
    std::vector<semu::MemorySample>& memory = timeline.memory[r];
    for (size_t i = 0; i < schedule.ranks[r].size(); ++i) {
      const ScheduledStage& s = schedule.ranks[r][i];
      const StageTimes::Interval& at = times.ranks[r][i];
      const Sweep& sweep = problem.sweeps[s.sweep];
      const ChoiceList& choices = sweep.stages[s.stage].choices;
      const Choice& c = choices[s.choice];
      const absl::string_view name = choices.name(s.choice);
      const int span = static_cast<int>(timeline.spans.size());
      const std::string choice =
          name.empty() ? absl::StrCat(s.choice) : std::string(name);
      timeline.spans.push_back(
          {r, at.start_ns, at.end_ns, StageKindLetter(s.kind), modules[s.sweep],
           sweep.microbatch,
           absl::StrCat(sweep.id, ", stage ", s.stage, ", choice ", choice)});
      switch (s.kind) {
        case StageKind::kForward:
          forward[s.sweep][s.stage] = span;
          memory.push_back({at.start_ns, live + c.activation_bytes});
          if (sweep.backward) {
            live += c.activation_bytes;
          } else {
            memory.push_back({at.end_ns, live});
          }
          break;
        case StageKind::kBackward:
        case StageKind::kInputGrad: {
          gradient[s.sweep][s.stage] = span;
          live -= c.activation_bytes;
          const ChoiceList& choices = sweep.stages[s.stage].choices;
          const bool fused =
              s.kind == StageKind::kBackward && problem.split_backward &&
              std::all_of(choices.begin(), choices.end(),
                          [](const Choice& o) { return o.weight_grad_ns > 0; });
          memory.push_back({at.start_ns, live + (fused ? c.fused_backward_bytes
                                                       : c.backward_bytes)});
          if (s.kind == StageKind::kInputGrad) live += c.weight_grad_bytes;
          memory.push_back({at.end_ns, live});
          break;
        }
        case StageKind::kWeightGrad:
          live -= c.weight_grad_bytes;
          memory.push_back({at.end_ns, live});
          break;
      }
    }
  }
  const auto cross = [&](int from, int to, bool is_gradient) {
    if (timeline.spans[from].rank == timeline.spans[to].rank) return;
    timeline.transfers.push_back({from, to, is_gradient, 0});
  };
  for (size_t s = 0; s < problem.sweeps.size(); ++s) {
    const Sweep& sweep = problem.sweeps[s];
    for (size_t k = 0; k + 1 < sweep.stages.size(); ++k) {
      cross(forward[s][k], forward[s][k + 1], false);
      if (sweep.backward) cross(gradient[s][k + 1], gradient[s][k], true);
    }
    for (int producer : sweep.after) {
      cross(forward[producer].back(), forward[s].front(), false);
      if (problem.sweeps[producer].backward) {
        cross(gradient[s].front(), gradient[producer].back(), true);
      }
    }
  }
  return timeline;
}

}  // namespace pipeweaver::search
