#include "search/cost_observations.h"

#include <cmath>
#include <cstddef>
#include <map>
#include <utility>

#include "search/lower/program.h"
#include "search/partition/stage_cost.h"
#include "semu/base/check.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::CostPass;
using semu::LayerCost;

// `count` layers of `kind`, as the action runs them.
void AddParts(const semu::StrategyCost& cost, int64_t count,
              semu::LayerKind kind, ActionKind action,
              semu::CostObservation* observation) {
  const auto add = [&](CostPass pass, int64_t ns) {
    observation->predicted_ns[semu::CostPart(kind, pass)] += count * ns;
  };
  switch (action) {
    case ActionKind::kForward:
      add(CostPass::kForward, cost.forward_ns);
      return;
    case ActionKind::kInputGrad:
      add(CostPass::kInputGrad, cost.input_grad_ns);
      return;
    case ActionKind::kWeightGrad:
      add(CostPass::kWeightGrad, cost.weight_grad_ns);
      return;
    case ActionKind::kBackward:
      break;
    default:
      PW_CHECK(false);
  }
  // In one piece: shared out as its parts would be, which is how a fused
  // backward is corrected (semu/cost/calibration/calibrated_cost.h).
  const int64_t parts_ns = cost.input_grad_ns + cost.weight_grad_ns;
  const int64_t fused_ns = cost.fused_backward_ns.value_or(parts_ns);
  const int64_t input_ns =
      parts_ns <= 0 ? fused_ns
                    : std::llround(static_cast<double>(fused_ns) *
                                   static_cast<double>(cost.input_grad_ns) /
                                   static_cast<double>(parts_ns));
  add(CostPass::kInputGrad, input_ns);
  add(CostPass::kWeightGrad, fused_ns - input_ns);
}

}  // namespace

std::vector<semu::CostObservation> ObserveCosts(
    const PlannableJob& job, const StepPlan& plan, int rank,
    absl::Span<const int64_t> duration_ns, const semu::CostModel& costs,
    int most, int64_t turn) {
  PW_CHECK(most >= 1 && turn >= 0);
  const std::vector<Action>& program = plan.programs.ranks[rank];
  PW_CHECK(program.size() == duration_ns.size());
  PW_CHECK(plan.step.shapes.size() == plan.step.sub_microbatches.size());
  std::vector<size_t> computing;
  for (size_t i = 0; i < program.size(); ++i) {
    if (IsCompute(program[i].kind)) computing.push_back(i);
  }

  const semu::Platform platform = semu::PlatformOf(job.job);
  const semu::ModuleGradients gradients = semu::RequiredGradients(job.job);
  // Costs of a module's groups of layers, by sub-microbatch.
  std::map<int, std::vector<LayerCost>> layers_of;
  std::vector<semu::CostObservation> observations;
  const size_t stride =
      std::max<size_t>(1, (computing.size() + most - 1) / most);
  for (size_t c = static_cast<size_t>(turn) % stride; c < computing.size();
       c += stride) {
    const Action& action = program[computing[c]];
    const SweepOrigin& origin = plan.step.sweeps[action.sweep];
    const SubMicrobatch& sub =
        plan.step.sub_microbatches[origin.sub_microbatch];
    const semu::Module& module = job.job.modules[sub.module];
    const auto [it, inserted] = layers_of.try_emplace(origin.sub_microbatch);
    if (inserted) {
      semu::LayerQuery query;
      query.shape = plan.step.shapes[origin.sub_microbatch];
      query.input_grad = plan.step.problem.sweeps[action.sweep].backward;
      query.weight_grad = query.input_grad && gradients.weight[sub.module];
      for (const semu::LayerGroup& group : module.layers) {
        query.layer = group.layer;
        it->second.push_back(costs.Cost(platform, query));
      }
    }
    const semu::Chunk& chunk = job.layout.modules[sub.module]
                                   .segments[origin.segment]
                                   .chunks[action.stage];
    const MemoryChoice& choice =
        plan.step
            .choices[sub.module][origin.segment][action.stage][action.choice];
    semu::CostObservation& observation = observations.emplace_back();
    for (const LayerPiece& piece : PiecesOf(RunsOf(module, chunk), choice)) {
      AddParts(it->second[piece.group][piece.strategy], piece.count,
               module.layers[piece.group].layer.kind, action.kind,
               &observation);
    }
    observation.measured_ns = duration_ns[computing[c]];
  }
  return observations;
}

}  // namespace pipeweaver::search
