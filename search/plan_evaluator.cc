#include "search/plan_evaluator.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/cost/cost_model.h"
#include "semu/cost/links.h"

namespace pipeweaver::search {
namespace {

int64_t OffloadBytes(const StepProblem& step, const Action& a) {
  const SweepOrigin& origin = step.sweeps[a.sweep];
  const int module = step.sub_microbatches[origin.sub_microbatch].module;
  const MemoryChoice& choice =
      step.choices[module][origin.segment][a.stage][a.choice];
  return choice.offload_layers > 0 ? choice.offload_bytes : 0;
}

// Translates a step's programs into what the emulator runs.
class Translation {
 public:
  // `graph` is that of step.problem.
  Translation(const StepProblem& step, const ProblemGraph& graph,
              const StepPrograms& programs, const LinkSpeeds& links)
      : step_(step),
        graph_(graph),
        programs_(programs),
        links_(links),
        offloads_(MostOffloadBytes(step).has_value()) {}

  // All but `bytes`.
  semu::StepProgram Operations() {
    semu::StepProgram out;
    out.transfers.reserve(programs_.transfers.size());
    for (const Transfer& x : programs_.transfers) {
      const semu::Link& link = semu::P2pLink(links_.parallelism, links_.links,
                                             x.from_rank, x.to_rank);
      const int64_t latency_ns = std::min(x.duration_ns, link.latency_ns);
      out.transfers.push_back(
          {x.from_rank, x.to_rank, x.duration_ns - latency_ns, latency_ns});
    }
    copy_.assign(graph_.pairs, -1);
    out.ranks.resize(programs_.ranks.size());
    for (size_t r = 0; r < programs_.ranks.size(); ++r) {
      std::vector<semu::StepOp>& ops = out.ranks[r];
      ops.reserve(programs_.ranks[r].size());
      for (const Action& a : programs_.ranks[r]) {
        ops.push_back(Operation(static_cast<int>(r), a, &out.copies));
      }
    }
    return out;
  }

  // What each operation allocates and frees, by rank and position.
  std::vector<std::vector<semu::MemoryChange>> Bytes() const {
    // [2 * pair + gradient]: bytes of its inputs
    std::vector<int64_t> received(2 * graph_.pairs, 0);
    for (const Transfer& x : programs_.transfers) {
      received[2 * Pair(x.to_sweep, x.to_stage) + x.gradient] += x.bytes;
    }
    // [pair]: the copy under way is a reload.
    std::vector<bool> reloads(graph_.pairs, false);
    std::vector<std::vector<semu::MemoryChange>> bytes;
    bytes.reserve(programs_.ranks.size());
    for (const std::vector<Action>& program : programs_.ranks) {
      std::vector<semu::MemoryChange>& changes = bytes.emplace_back();
      changes.reserve(program.size());
      for (const Action& a : program) {
        const int pair = Pair(a.sweep, a.stage);
        if (a.kind == ActionKind::kOffload || a.kind == ActionKind::kReload) {
          reloads[pair] = a.kind == ActionKind::kReload;
        }
        changes.push_back(Change(a, &received[2 * pair], reloads[pair]));
      }
    }
    return bytes;
  }

 private:
  int Pair(int sweep, int stage) const {
    return graph_.sweep_first_pair[sweep] + stage;
  }
  const GraphChoice& ChoiceOf(const Action& a) const {
    return graph_.choices_of(Pair(a.sweep, a.stage))[a.choice];
  }

  semu::StepOp Operation(int rank, const Action& a,
                         std::vector<semu::StepCopy>* copies) {
    using enum semu::StepOpKind;
    constexpr semu::StepOpKind kKinds[kNumActionKinds] = {
        kCompute,  kCompute,  kCompute,   kCompute,   kPostSend, kPostRecv,
        kWaitSend, kWaitRecv, kStartCopy, kStartCopy, kWaitCopy, kMark};
    constexpr int64_t GraphChoice::*kDurations[] = {
        &GraphChoice::forward_ns, &GraphChoice::backward_ns,
        &GraphChoice::input_grad_ns, &GraphChoice::weight_grad_ns};
    const int kind = static_cast<int>(a.kind);
    if (IsTransfer(a.kind)) return semu::StepOp(kKinds[kind], a.transfer, 0);
    if (IsCompute(a.kind)) {
      return semu::StepOp(kCompute, 0,
                          ChoiceOf(a).*kDurations[kind] - CopyWait(a));
    }
    if (a.kind == ActionKind::kGradsReady) return semu::StepOp(kMark, 0, 0);
    int& copy = copy_[Pair(a.sweep, a.stage)];
    if (a.kind != ActionKind::kWaitCopy) {
      copy = static_cast<int>(copies->size());
      copies->push_back({rank, a.kind == ActionKind::kOffload,
                         CopyNs(OffloadBytes(step_, a))});
    }
    return semu::StepOp(kKinds[kind], copy, 0);
  }

  // What of a stage's length is not computing; copies count by themselves.
  int64_t CopyWait(const Action& a) const {
    if (!offloads_) return 0;
    const Choice& c =
        step_.problem.sweeps[a.sweep].stages[a.stage].choices[a.choice];
    switch (a.kind) {
      case ActionKind::kForward:
        return c.forward_copy_wait_ns;
      case ActionKind::kInputGrad:
        return c.input_grad_copy_wait_ns;
      case ActionKind::kWeightGrad:
        return 0;
      default:
        return c.backward_copy_wait_ns;
    }
  }

  // `received`: bytes of the inputs of the stage pair's F and of its gradient.
  semu::MemoryChange Change(const Action& a, const int64_t* received,
                            bool reloads) const {
    switch (a.kind) {
      case ActionKind::kForward: {
        const int64_t bytes = ChoiceOf(a).activation_bytes;
        if (!graph_.has_backward(Pair(a.sweep, a.stage))) {
          return {bytes - received[0], -bytes, 0};
        }
        return {bytes + OffloadBytes(step_, a) - received[0], 0, 0};
      }
      case ActionKind::kBackward: {
        const GraphChoice& c = ChoiceOf(a);
        return {-c.activation_bytes - received[1] - OffloadBytes(step_, a), 0,
                c.backward_bytes};
      }
      case ActionKind::kInputGrad: {
        const GraphChoice& c = ChoiceOf(a);
        return {-c.activation_bytes - received[1] - OffloadBytes(step_, a),
                c.weight_grad_bytes,
                std::max(c.input_grad_bytes, c.weight_grad_bytes)};
      }
      case ActionKind::kWeightGrad:
        return {0, -ChoiceOf(a).weight_grad_bytes, 0};
      case ActionKind::kPostSend:
      case ActionKind::kPostRecv:
        return {programs_.transfers[a.transfer].bytes, 0, 0};
      case ActionKind::kWaitSend:
        return {0, -programs_.transfers[a.transfer].bytes, 0};
      case ActionKind::kReload:
        return {OffloadBytes(step_, a), 0, 0};
      case ActionKind::kWaitCopy:
        return {0, reloads ? 0 : -OffloadBytes(step_, a), 0};
      case ActionKind::kWaitRecv:
      case ActionKind::kOffload:
      case ActionKind::kGradsReady:
        break;
    }
    return {};
  }

  // Bounded as the costs of the stages that it belongs to.
  int64_t CopyNs(int64_t bytes) const {
    if (links_.links.host.bandwidth_bytes_per_second <= 0) return 0;
    const double ns =
        static_cast<double>(bytes) * 1e9 /
        static_cast<double>(links_.links.host.bandwidth_bytes_per_second);
    return links_.links.host.latency_ns +
           std::llround(std::min<double>(ns, semu::kMaxCost));
  }

  const StepProblem& step_;
  const ProblemGraph& graph_;
  const StepPrograms& programs_;
  const LinkSpeeds& links_;
  const bool offloads_;    // any choice
  std::vector<int> copy_;  // [pair]: its last copy
};

absl::Status CheckFactor(const char* field, double value) {
  if (value > 0 && value <= 1e6) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, ", must be above 0, at most 1e6"));
}

}  // namespace

LinkSpeeds LinkSpeedsOf(const semu::Job& job) {
  return {job.parallelism, job.links};
}

PlanEvaluator::PlanEvaluator(const StepProblem& step,
                             const StepPrograms& programs,
                             const LinkSpeeds& links) {
  const ProblemGraph graph = BuildProblemGraph(step.problem);
  Translation translation(step, graph, programs, links);
  program_ = translation.Operations();
  program_.bytes = translation.Bytes();
  peak_bytes_ = semu::PeakBytes(program_);
}

absl::StatusOr<semu::EmulatedStep> PlanEvaluator::Predict(
    const StepProblem& step, const ProblemGraph& graph,
    const StepPrograms& programs, const LinkSpeeds& links) {
  const semu::StepProgram program =
      Translation(step, graph, programs, links).Operations();
  semu::EmulatedStep emulated;
  PW_RETURN_IF_ERROR(semu::EmulateStep(program, {}, &emulated));
  return emulated;
}

absl::StatusOr<StepEvaluation> PlanEvaluator::Evaluate(
    const EvaluationOptions& options) const {
  PW_ASSIGN_OR_RETURN(const semu::EmulatedStep emulated, Emulate(options));
  StepEvaluation evaluation;
  evaluation.makespan_ns = emulated.makespan_ns;
  for (size_t r = 0; r < emulated.ranks.size(); ++r) {
    const semu::EmulatedStep::Rank& rank = emulated.ranks[r];
    evaluation.ranks.push_back({rank.busy_ns, rank.transfer_wait_ns,
                                rank.copy_wait_ns, rank.end_ns,
                                peak_bytes_[r]});
  }
  return evaluation;
}

absl::StatusOr<semu::EmulatedStep> PlanEvaluator::Emulate(
    const EvaluationOptions& options) const {
  PW_RETURN_IF_ERROR(CheckFactor("latency_factor", options.latency_factor));
  PW_RETURN_IF_ERROR(CheckFactor("bandwidth_factor", options.bandwidth_factor));
  if (!(options.duration_noise >= 0 && options.duration_noise <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "duration_noise: ", options.duration_noise, ", must be 0 .. 1"));
  }
  semu::EmulationOptions emulation;
  emulation.contention = options.contention;
  emulation.latency_factor = options.latency_factor;
  emulation.bandwidth_factor = options.bandwidth_factor;
  emulation.duration_noise = options.duration_noise;
  emulation.seed = options.seed;
  semu::EmulatedStep emulated;
  PW_RETURN_IF_ERROR(semu::EmulateStep(program_, emulation, &emulated));
  return emulated;
}

void PlanEvaluator::WriteTimes(const semu::EmulatedStep& emulated,
                               StepPrograms* programs) {
  programs->makespan_ns = emulated.makespan_ns;
  PW_CHECK(programs->ranks.size() == emulated.ends_ns.size());
  for (size_t r = 0; r < programs->ranks.size(); ++r) {
    std::vector<Action>& actions = programs->ranks[r];
    PW_CHECK(actions.size() == emulated.ends_ns[r].size());
    for (size_t i = 0; i < actions.size(); ++i) {
      actions[i].start_ns = emulated.StartNs(r, i);
      actions[i].end_ns = emulated.ends_ns[r][i];
    }
  }
}

std::vector<std::vector<semu::MemorySample>> PlanEvaluator::Memory(
    const StepPrograms& programs) const {
  PW_CHECK(programs.ranks.size() == program_.ranks.size());
  std::vector<std::vector<semu::MemorySample>> memory(programs.ranks.size());
  for (size_t r = 0; r < programs.ranks.size(); ++r) {
    PW_CHECK(programs.ranks[r].size() == program_.bytes[r].size());
    int64_t live = 0;
    int64_t last = -1;
    const auto sample = [&](int64_t time_ns, int64_t bytes) {
      if (bytes == last) return;
      memory[r].push_back({time_ns, bytes});
      last = bytes;
    };
    for (size_t i = 0; i < programs.ranks[r].size(); ++i) {
      const Action& a = programs.ranks[r][i];
      const semu::MemoryChange& change = program_.bytes[r][i];
      live += change.at_start;
      sample(a.start_ns, live + change.transient);
      live += change.at_end;
      sample(a.end_ns, live);
    }
  }
  return memory;
}

}  // namespace pipeweaver::search
