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
  Finder(const ProblemGraph& graph, const Schedule& schedule,
         const StageTimes& times)
      : graph_(graph), schedule_(schedule), times_(times) {}

  BubbleCauses Run() {
    IndexEnds();
    std::vector<int64_t> busy(graph_.ranks, 0);
    for (int r = 0; r < graph_.ranks; ++r) {
      for (const StageTimes::Interval& stage : times_.ranks[r]) {
        busy[r] += stage.end_ns - stage.start_ns;
      }
    }
    const int64_t busiest =
        busy.empty() ? 0 : *std::max_element(busy.begin(), busy.end());
    const int64_t rest = times_.makespan_ns - busiest;
    BubbleCauses causes;
    for (int r = 0; r < graph_.ranks; ++r) {
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
  int PairOf(const ScheduledStage& s) const {
    return graph_.sweep_first_pair[s.sweep] + s.stage;
  }
  const GraphChoice& ChoiceOf(const ScheduledStage& s) const {
    return graph_.choices_of(PairOf(s))[s.choice];
  }

  void IndexEnds() {
    forward_end_.assign(graph_.pairs, 0);
    gradient_end_.assign(graph_.pairs, 0);
    for (int r = 0; r < graph_.ranks; ++r) {
      for (size_t i = 0; i < schedule_.ranks[r].size(); ++i) {
        const ScheduledStage& s = schedule_.ranks[r][i];
        if (s.kind == StageKind::kWeightGrad) continue;
        (s.kind == StageKind::kForward ? forward_end_
                                       : gradient_end_)[PairOf(s)] =
            times_.ranks[r][i].end_ns;
      }
    }
  }

  Inputs InputsOf(const ScheduledStage& s) const {
    Inputs inputs;
    if (s.kind == StageKind::kWeightGrad) return inputs;
    const bool forward = s.kind == StageKind::kForward;
    const std::vector<int64_t>& ends = forward ? forward_end_ : gradient_end_;
    for (const GraphEdge& edge : forward ? graph_.producers_of(PairOf(s))
                                         : graph_.consumers_of(PairOf(s))) {
      const int64_t end_ns = ends[edge.pair];
      const int64_t there_ns = end_ns + edge.delay_ns;
      if (there_ns >= inputs.there_ns) inputs = {end_ns, there_ns};
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
      const int64_t there_ns = InputsOf(s).there_ns;
      if (there_ns <= ready[i].time_ns) {
        ready[i] = {there_ns, ChoiceOf(s).activation_bytes};
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
          live + other.bytes > graph_.limit_bytes[r]) {
        until_ns = std::max(free_ns, other.time_ns);
        gaps.memory_ns += start_ns - until_ns;
      }
      if (free_ns < until_ns) {
        const int64_t made_ns =
            std::clamp(InputsOf(s).made_ns, free_ns, until_ns);
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
    const GraphChoice& c = ChoiceOf(s);
    switch (s.kind) {
      case StageKind::kForward:
        return graph_.has_backward(PairOf(s)) ? c.activation_bytes : 0;
      case StageKind::kBackward:
        return -c.activation_bytes;
      case StageKind::kInputGrad:
        return c.weight_grad_bytes - c.activation_bytes;
      case StageKind::kWeightGrad:
        return -c.weight_grad_bytes;
    }
    return 0;
  }

  const ProblemGraph& graph_;
  const Schedule& schedule_;
  const StageTimes& times_;
  std::vector<int64_t> forward_end_;   // [pair]
  std::vector<int64_t> gradient_end_;  // [pair]: of B or I
};

}  // namespace

BubbleCauses FindBubbleCauses(const ProblemGraph& graph,
                              const Schedule& schedule,
                              const StageTimes& times) {
  return Finder(graph, schedule, times).Run();
}

}  // namespace pipeweaver::search
