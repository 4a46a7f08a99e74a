#include "search/plan_evaluator.h"

#include <algorithm>
#include <cmath>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

// Translates a step's programs into what the emulator runs.
class Translation {
 public:
  Translation(const StepProblem& step, const StepPrograms& programs,
              const LinkSpeeds& links)
      : step_(step), programs_(programs), links_(links) {}

  semu::StepProgram Run() {
    IndexPairs();
    for (const Transfer& x : programs_.transfers) {
      const int64_t latency_ns = std::min(x.duration_ns, links_.p2p_latency_ns);
      out_.transfers.push_back(
          {x.from_rank, x.to_rank, x.duration_ns - latency_ns, latency_ns});
      received_[2 * Pair(x.to_sweep, x.to_stage) + x.gradient] += x.bytes;
    }
    out_.ranks.resize(programs_.ranks.size());
    out_.bytes.resize(programs_.ranks.size());
    for (size_t r = 0; r < programs_.ranks.size(); ++r) {
      out_.ranks[r].reserve(programs_.ranks[r].size());
      out_.bytes[r].reserve(programs_.ranks[r].size());
      for (const Action& a : programs_.ranks[r]) {
        Translate(static_cast<int>(r), a);
      }
    }
    return std::move(out_);
  }

 private:
  int Pair(int sweep, int stage) const { return first_pair_[sweep] + stage; }

  void IndexPairs() {
    const Problem& problem = step_.problem;
    const Choice* list = nullptr;
    bool splits = false;
    first_pair_.push_back(0);
    for (const Sweep& sweep : problem.sweeps) {
      first_pair_.push_back(first_pair_.back() +
                            static_cast<int>(sweep.stages.size()));
      for (const Stage& stage : sweep.stages) {
        // Stages share their lists of choices.
        if (stage.choices.data() != list) {
          list = stage.choices.data();
          splits =
              problem.split_backward &&
              std::all_of(stage.choices.begin(), stage.choices.end(),
                          [](const Choice& c) { return c.weight_grad_ns > 0; });
        }
        splits_.push_back(splits);
      }
    }
    received_.assign(2 * splits_.size(), 0);
    copy_.assign(splits_.size(), -1);
  }

  void Add(int rank, semu::StepOpKind kind, int index, int64_t duration_ns,
           const semu::MemoryChange& change) {
    out_.ranks[rank].emplace_back(kind, index, duration_ns);
    out_.bytes[rank].push_back(change);
  }

  void Translate(int rank, const Action& a) {
    if (a.transfer >= 0) {
      TranslateTransfer(rank, a);
      return;
    }
    const Sweep& sweep = step_.problem.sweeps[a.sweep];
    const Stage& stage = sweep.stages[a.stage];
    const int pair = Pair(a.sweep, a.stage);
    const Choice& c = stage.choices[a.choice];
    using enum semu::StepOpKind;
    switch (a.kind) {
      case ActionKind::kForward:
        Add(rank, kCompute, 0, c.forward_ns,
            {c.activation_bytes - received_[2 * pair],
             sweep.backward ? 0 : -c.activation_bytes, 0});
        break;
      case ActionKind::kBackward: {
        const bool fused = splits_[pair];
        Add(rank, kCompute, 0,
            fused ? c.fused_backward_ns.value_or(0)
                  : c.input_grad_ns + c.weight_grad_ns,
            {-c.activation_bytes - received_[2 * pair + 1] - OffloadBytes(a), 0,
             fused ? c.fused_backward_bytes : c.backward_bytes});
        break;
      }
      case ActionKind::kInputGrad:
        Add(rank, kCompute, 0, c.input_grad_ns,
            {-c.activation_bytes - received_[2 * pair + 1] - OffloadBytes(a),
             c.weight_grad_bytes,
             std::max(c.backward_bytes, c.weight_grad_bytes)});
        break;
      case ActionKind::kWeightGrad:
        Add(rank, kCompute, 0, c.weight_grad_ns, {0, -c.weight_grad_bytes, 0});
        break;
      case ActionKind::kOffload:
      case ActionKind::kReload:
        copy_[pair] = static_cast<int>(out_.copies.size());
        out_.copies.push_back(
            {rank, a.kind == ActionKind::kOffload, CopyNs(OffloadBytes(a))});
        Add(rank, kStartCopy, copy_[pair], 0, {OffloadBytes(a), 0, 0});
        break;
      case ActionKind::kWaitCopy: {
        const bool offload = out_.copies[copy_[pair]].to_host;
        Add(rank, kWaitCopy, copy_[pair], 0,
            {0, offload ? -OffloadBytes(a) : 0, 0});
        break;
      }
      case ActionKind::kGradsReady:
        Add(rank, kMark, 0, 0, {});
        break;
      default:  // a transfer's
        break;
    }
  }

  void TranslateTransfer(int rank, const Action& a) {
    const int64_t bytes = programs_.transfers[a.transfer].bytes;
    using enum semu::StepOpKind;
    switch (a.kind) {
      case ActionKind::kPostSend:
        Add(rank, kPostSend, a.transfer, 0, {bytes, 0, 0});
        break;
      case ActionKind::kPostRecv:
        Add(rank, kPostRecv, a.transfer, 0, {bytes, 0, 0});
        break;
      case ActionKind::kWaitSend:
        Add(rank, kWaitSend, a.transfer, 0, {0, -bytes, 0});
        break;
      case ActionKind::kWaitRecv:
        Add(rank, kWaitRecv, a.transfer, 0, {});
        break;
      default:
        break;
    }
  }

  int64_t OffloadBytes(const Action& a) const {
    const SweepOrigin& origin = step_.sweeps[a.sweep];
    const int module = step_.sub_microbatches[origin.sub_microbatch].module;
    const MemoryChoice& choice =
        step_.choices[module][origin.segment][a.stage][a.choice];
    return choice.offload_layers > 0 ? choice.offload_bytes : 0;
  }

  int64_t CopyNs(int64_t bytes) const {
    if (links_.host_bandwidth_bytes_per_second <= 0) return 0;
    return links_.host_latency_ns +
           std::llround(
               static_cast<double>(bytes) * 1e9 /
               static_cast<double>(links_.host_bandwidth_bytes_per_second));
  }

  const StepProblem& step_;
  const StepPrograms& programs_;
  const LinkSpeeds& links_;
  std::vector<int> first_pair_;    // [sweep], and the number of pairs
  std::vector<bool> splits_;       // [pair]
  std::vector<int64_t> received_;  // [2 * pair + gradient]: bytes of its inputs
  std::vector<int> copy_;          // [pair]: its last copy
  semu::StepProgram out_;
};

absl::Status CheckFactor(const char* field, double value) {
  if (value > 0 && value <= 1e6) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, ", must be above 0, at most 1e6"));
}

}  // namespace

LinkSpeeds LinkSpeedsOf(const semu::Job& job) {
  LinkSpeeds speeds;
  speeds.p2p_latency_ns = job.links.p2p_inter_node.latency_ns;
  speeds.host_latency_ns = job.links.host.latency_ns;
  speeds.host_bandwidth_bytes_per_second =
      job.links.host.bandwidth_bytes_per_second;
  return speeds;
}

PlanEvaluator::PlanEvaluator(const StepProblem& step,
                             const StepPrograms& programs,
                             const LinkSpeeds& links)
    : program_(Translation(step, programs, links).Run()),
      peak_bytes_(semu::PeakBytes(program_)) {}

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
