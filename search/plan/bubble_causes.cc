#include "search/plan/bubble_causes.h"

#include <algorithm>
#include <limits>
#include <vector>

namespace pipeweaver::search {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// When the last input of a stage was made, and when it was there.
struct Inputs {
  int64_t made_ns = 0;
  int64_t there_ns = 0;
};

class Finder {
 public:
  Finder(const Problem& problem, const Schedule& schedule,
         const StageTimes& times)
      : problem_(problem), schedule_(schedule), times_(times) {}

  BubbleCauses Run() {
    IndexEnds();
    std::vector<int64_t> busy(problem_.ranks, 0);
    for (int r = 0; r < problem_.ranks; ++r) {
      for (const StageTimes::Interval& stage : times_.ranks[r]) {
        busy[r] += stage.end_ns - stage.start_ns;
      }
    }
    const int64_t busiest =
        busy.empty() ? 0 : *std::max_element(busy.begin(), busy.end());
    const int64_t rest = times_.makespan_ns - busiest;
    BubbleCauses causes;
    for (int r = 0; r < problem_.ranks; ++r) {
      causes.imbalance_ns += busiest - busy[r];
      const BubbleCauses gaps = GapsOf(r);
      const double idle = static_cast<double>(times_.makespan_ns - busy[r]);
      const double share = idle > 0 ? static_cast<double>(rest) / idle : 0;
      const int64_t memory_ns =
          static_cast<int64_t>(static_cast<double>(gaps.memory_ns) * share);
      const int64_t transfer_ns =
          static_cast<int64_t>(static_cast<double>(gaps.transfer_ns) * share);
      causes.memory_ns += memory_ns;
      causes.transfer_ns += transfer_ns;
      causes.dependency_ns += rest - memory_ns - transfer_ns;
    }
    return causes;
  }

 private:
  void IndexEnds() {
    forward_end_.resize(problem_.sweeps.size());
    gradient_end_.resize(problem_.sweeps.size());
    consumers_.resize(problem_.sweeps.size());
    for (size_t s = 0; s < problem_.sweeps.size(); ++s) {
      forward_end_[s].assign(problem_.sweeps[s].stages.size(), 0);
      gradient_end_[s].assign(problem_.sweeps[s].stages.size(), 0);
      for (int producer : problem_.sweeps[s].after) {
        consumers_[producer].push_back(static_cast<int>(s));
      }
    }
    for (int r = 0; r < problem_.ranks; ++r) {
      for (size_t i = 0; i < schedule_.ranks[r].size(); ++i) {
        const ScheduledStage& s = schedule_.ranks[r][i];
        if (s.kind == StageKind::kWeightGrad) continue;
        (s.kind == StageKind::kForward ? forward_end_
                                       : gradient_end_)[s.sweep][s.stage] =
            times_.ranks[r][i].end_ns;
      }
    }
  }

  Inputs InputsOf(const ScheduledStage& s, int rank) const {
    Inputs inputs;
    const auto take = [&](int from_sweep, int from_stage, int64_t end_ns,
                          int64_t transfer_ns) {
      const bool crosses =
          problem_.sweeps[from_sweep].stages[from_stage].rank != rank;
      const int64_t there_ns = end_ns + (crosses ? transfer_ns : 0);
      if (there_ns >= inputs.there_ns) inputs = {end_ns, there_ns};
    };
    const Sweep& sweep = problem_.sweeps[s.sweep];
    const int last = static_cast<int>(sweep.stages.size()) - 1;
    if (s.kind == StageKind::kForward && s.stage > 0) {
      take(s.sweep, s.stage - 1, forward_end_[s.sweep][s.stage - 1],
           sweep.stages[s.stage - 1].transfer_ns);
    } else if (s.kind == StageKind::kForward) {
      for (int producer : sweep.after) {
        const Sweep& from = problem_.sweeps[producer];
        take(producer, static_cast<int>(from.stages.size()) - 1,
             forward_end_[producer].back(), from.stages.back().transfer_ns);
      }
    } else if (s.kind != StageKind::kWeightGrad && s.stage < last) {
      take(s.sweep, s.stage + 1, gradient_end_[s.sweep][s.stage + 1],
           sweep.stages[s.stage].transfer_ns);
    } else if (s.kind != StageKind::kWeightGrad) {
      for (int consumer : consumers_[s.sweep]) {
        take(consumer, 0, gradient_end_[consumer].front(),
             sweep.stages[last].transfer_ns);
      }
    }
    return inputs;
  }

  // The causes of a rank's gaps; imbalance is left 0.
  BubbleCauses GapsOf(int r) const {
    const std::vector<ScheduledStage>& order = schedule_.ranks[r];
    // Of the forwards from a position on, the one whose inputs came first.
    struct Ready {
      int64_t time_ns = kNever;
      int64_t bytes = 0;
    };
    std::vector<Ready> ready(order.size() + 1);
    for (size_t i = order.size(); i-- > 0;) {
      ready[i] = ready[i + 1];
      const ScheduledStage& s = order[i];
      if (s.kind != StageKind::kForward) continue;
      const int64_t there_ns = InputsOf(s, r).there_ns;
      if (there_ns <= ready[i].time_ns) {
        ready[i] = {there_ns, problem_.sweeps[s.sweep]
                                  .stages[s.stage]
                                  .choices[s.choice]
                                  .activation_bytes};
      }
    }
    BubbleCauses gaps;
    int64_t free_ns = 0;
    int64_t live = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      const ScheduledStage& s = order[i];
      const int64_t start_ns = times_.ranks[r][i].start_ns;
      int64_t until_ns = start_ns;  // of the gap that memory did not cause
      const Ready& other = ready[i + 1];
      if (other.time_ns < start_ns &&
          live + other.bytes > problem_.memory_limit_bytes[r]) {
        until_ns = std::max(free_ns, other.time_ns);
        gaps.memory_ns += start_ns - until_ns;
      }
      if (free_ns < until_ns) {
        const int64_t made_ns =
            std::clamp(InputsOf(s, r).made_ns, free_ns, until_ns);
        gaps.dependency_ns += made_ns - free_ns;
        gaps.transfer_ns += until_ns - made_ns;
      }
      free_ns = times_.ranks[r][i].end_ns;
      live += Kept(s);
    }
    gaps.dependency_ns += times_.makespan_ns - free_ns;
    return gaps;
  }

  // Bytes that stay held behind `s`, less those held before.
  int64_t Kept(const ScheduledStage& s) const {
    const Sweep& sweep = problem_.sweeps[s.sweep];
    const Choice& c = sweep.stages[s.stage].choices[s.choice];
    switch (s.kind) {
      case StageKind::kForward:
        return sweep.backward ? c.activation_bytes : 0;
      case StageKind::kBackward:
        return -c.activation_bytes;
      case StageKind::kInputGrad:
        return c.weight_grad_bytes - c.activation_bytes;
      case StageKind::kWeightGrad:
        return -c.weight_grad_bytes;
    }
    return 0;
  }

  const Problem& problem_;
  const Schedule& schedule_;
  const StageTimes& times_;
  std::vector<std::vector<int64_t>> forward_end_;   // [sweep][stage]
  std::vector<std::vector<int64_t>> gradient_end_;  // [sweep][stage]: of B or I
  std::vector<std::vector<int>> consumers_;         // [sweep]
};

}  // namespace

BubbleCauses FindBubbleCauses(const Problem& problem, const Schedule& schedule,
                              const StageTimes& times) {
  return Finder(problem, schedule, times).Run();
}

}  // namespace pipeweaver::search
