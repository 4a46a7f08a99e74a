// Attribution of idle time; see bubbles.h.

#include "search/problem/bubbles.h"

#include <algorithm>
#include <cstdint>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {
namespace {

class Attribution {
 public:
  Attribution(const ProblemGraph& graph, const Schedule& schedule,
              const StageTimes& times)
      : graph_(graph),
        schedule_(schedule),
        times_(times),
        choice_(graph.pairs, 0),
        forward_end_(graph.pairs, 0),
        gradient_end_(graph.pairs, 0),
        arrival_(graph.pairs, 0) {
    for (int r = 0; r < graph.ranks; ++r) {
      for (size_t i = 0; i < schedule.ranks[r].size(); ++i) {
        const ScheduledStage& entry = schedule.ranks[r][i];
        const int p = PairOf(entry);
        const int64_t end = times.ranks[r][i].end_ns;
        if (entry.kind == StageKind::kForward) {
          forward_end_[p] = end;
          choice_[p] = entry.choice;
        } else if (entry.kind != StageKind::kWeightGrad) {
          gradient_end_[p] = end;
        }
      }
    }
    for (int p = 0; p < graph.pairs; ++p) {
      for (const GraphEdge& edge : graph.producers_of(p)) {
        arrival_[p] =
            std::max(arrival_[p], forward_end_[edge.pair] + edge.delay_ns);
      }
    }
  }

  Bubbles OfRank(int r) const {
    Bubbles bubbles;
    const auto& row = schedule_.ranks[r];
    int64_t live = 0, free = 0;
    for (size_t i = 0; i < row.size(); ++i) {
      const int64_t start = times_.ranks[r][i].start_ns;
      if (start > free) {
        const int64_t sent =
            std::clamp(LastInputEnd(row[i], start), free, start);
        bubbles.transfer_ns += start - sent;
        int64_t& waits = LacksMemory(r, i, live, free) ? bubbles.memory_ns
                                                       : bubbles.dependency_ns;
        waits += sent - free;
      }
      free = times_.ranks[r][i].end_ns;
      live += Change(row[i]);
    }
    bubbles.dependency_ns += times_.makespan_ns - free;
    return bubbles;
  }

 private:
  int PairOf(const ScheduledStage& entry) const {
    return graph_.sweep_first_pair[entry.sweep] + entry.stage;
  }
  const GraphChoice& ChoiceOf(int p) const {
    return graph_.choices_of(p)[choice_[p]];
  }

  // The end of the stage whose output arrives at `start`.
  int64_t LastInputEnd(const ScheduledStage& entry, int64_t start) const {
    const int p = PairOf(entry);
    int64_t last = 0;
    if (entry.kind == StageKind::kForward) {
      for (const GraphEdge& edge : graph_.producers_of(p)) {
        if (forward_end_[edge.pair] + edge.delay_ns == start) {
          last = std::max(last, forward_end_[edge.pair]);
        }
      }
    } else if (entry.kind != StageKind::kWeightGrad) {
      for (const GraphEdge& edge : graph_.consumers_of(p)) {
        if (gradient_end_[edge.pair] + edge.delay_ns == start) {
          last = std::max(last, gradient_end_[edge.pair]);
        }
      }
    }
    return last;
  }

  // Whether a forward behind position `from` has its inputs at `now` and does
  // not fit beside `live`.
  bool LacksMemory(int r, size_t from, int64_t live, int64_t now) const {
    for (size_t i = from; i < schedule_.ranks[r].size(); ++i) {
      const ScheduledStage& entry = schedule_.ranks[r][i];
      if (entry.kind != StageKind::kForward) continue;
      const int p = PairOf(entry);
      if (arrival_[p] <= now &&
          live + ChoiceOf(p).activation_bytes > graph_.limit_bytes[r]) {
        return true;
      }
    }
    return false;
  }

  // The change in live bytes once the stage has ended.
  int64_t Change(const ScheduledStage& entry) const {
    const int p = PairOf(entry);
    const GraphChoice& choice = ChoiceOf(p);
    switch (entry.kind) {
      case StageKind::kForward:
        return graph_.has_backward(p) ? choice.activation_bytes : 0;
      case StageKind::kBackward:
        return -choice.activation_bytes;
      case StageKind::kInputGrad:
        return choice.weight_grad_bytes - choice.activation_bytes;
      case StageKind::kWeightGrad:
        return -choice.weight_grad_bytes;
    }
    return 0;
  }

  const ProblemGraph& graph_;
  const Schedule& schedule_;
  const StageTimes& times_;
  std::vector<int32_t> choice_;
  std::vector<int64_t> forward_end_, gradient_end_, arrival_;
};

}  // namespace

std::vector<Bubbles> AttributeBubbles(const ProblemGraph& graph,
                                      const Schedule& schedule,
                                      const StageTimes& times) {
  const Attribution attribution(graph, schedule, times);
  std::vector<Bubbles> bubbles(graph.ranks);
  std::vector<int64_t> busy(graph.ranks, 0);
  for (int r = 0; r < graph.ranks; ++r) {
    bubbles[r] = attribution.OfRank(r);
    busy[r] = times.makespan_ns - bubbles[r].total_ns();
  }
  const int64_t busiest = *std::max_element(busy.begin(), busy.end());
  for (int r = 0; r < graph.ranks; ++r) {
    const int64_t less = std::min(bubbles[r].dependency_ns, busiest - busy[r]);
    bubbles[r].dependency_ns -= less;
    bubbles[r].imbalance_ns += less;
  }
  return bubbles;
}

}  // namespace pipeweaver::search
