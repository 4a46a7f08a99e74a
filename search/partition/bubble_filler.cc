// A simulation in which the rank that can start first takes its next stage.

#include "search/partition/bubble_filler.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>

namespace pipeweaver::search {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

class Filler {
 public:
  Filler(const Problem& problem, const ProblemGraph& graph,
         const Schedule& order, const BubbleRule& rule)
      : problem_(problem),
        graph_(graph),
        order_(order),
        rule_(rule),
        in_order_(graph.sweeps, false),
        forward_(graph.pairs),
        backward_(graph.pairs),
        ranks_(graph.ranks) {
    for (const auto& rank : order.ranks) {
      for (const ScheduledStage& stage : rank) in_order_[stage.sweep] = true;
    }
    int microbatches = 0;
    for (const Sweep& sweep : problem.sweeps) {
      microbatches = std::max(microbatches, sweep.microbatch + 1);
    }
    fillers_left_.resize(microbatches, 0);
    begun_.resize(microbatches, false);
    for (int p = 0; p < graph.pairs; ++p) {
      forward_[p].waits = graph.producers_of(p).size();
      backward_[p].waits = 1 + graph.consumers_of(p).size();
      if (!in_order_[graph.pair_sweep[p]]) {
        fillers_left_[MicrobatchOf(p)] += graph.has_backward(p) ? 2 : 1;
      }
    }
    schedule_.ranks.resize(graph.ranks);
  }

  std::optional<Schedule> Run() {
    int64_t left = 0;
    for (int p = 0; p < graph_.pairs; ++p) {
      left += graph_.has_backward(p) ? 2 : 1;
      if (forward_[p].waits == 0) Arrive(p, true);
    }
    for (; left > 0; --left) {
      int first = -1;
      for (int r = 0; r < graph_.ranks; ++r) {
        if (ranks_[r].stale) Choose(r);
        if (ranks_[r].start_ns != kNever &&
            (first < 0 || ranks_[r].start_ns < ranks_[first].start_ns)) {
          first = r;
        }
      }
      if (first < 0) return std::nullopt;
      Execute(first);
    }
    return std::move(schedule_);
  }

 private:
  struct Readiness {
    int waits = 0;
    int64_t ready_ns = 0;
  };
  struct FillerStage {
    int32_t pair = 0;
    bool forward = true;
  };
  struct Rank {
    size_t next = 0;  // in its order
    int64_t free_ns = 0;
    std::vector<FillerStage> ready;
    // What it does next; out of date where `stale`.
    bool stale = true;
    int64_t start_ns = kNever;
    int choice = -1;  // index in `ready`, -1: the order's next stage
  };

  int MicrobatchOf(int pair) const {
    return problem_.sweeps[graph_.pair_sweep[pair]].microbatch;
  }
  int64_t LengthOf(int pair, bool forward) const {
    const GraphChoice& choice = graph_.choices_of(pair)[0];
    return forward ? choice.forward_ns : choice.backward_ns;
  }
  const Readiness& Of(int pair, bool forward) const {
    return forward ? forward_[pair] : backward_[pair];
  }

  // All inputs of the stage have been computed.
  void Arrive(int pair, bool forward) {
    Rank& rank = ranks_[graph_.pair_rank[pair]];
    rank.stale = true;
    if (!in_order_[graph_.pair_sweep[pair]]) {
      rank.ready.push_back({pair, forward});
    }
  }

  void Feed(int pair, bool forward, int64_t ns) {
    Readiness& readiness = forward ? forward_[pair] : backward_[pair];
    readiness.ready_ns = std::max(readiness.ready_ns, ns);
    if (--readiness.waits == 0) Arrive(pair, forward);
  }

  void Choose(int r) {
    Rank& rank = ranks_[r];
    rank.stale = false;
    rank.start_ns = kNever;
    rank.choice = -1;
    if (rank.next < order_.ranks[r].size()) {
      const ScheduledStage& stage = order_.ranks[r][rank.next];
      const Readiness& readiness =
          Of(graph_.sweep_first_pair[stage.sweep] + stage.stage,
             stage.kind == StageKind::kForward);
      if (readiness.waits == 0) {
        rank.start_ns = std::max(rank.free_ns, readiness.ready_ns);
      }
    }
    const int64_t order_ns = rank.start_ns;
    // Of the fillers that can start first, by microbatch.
    std::tuple<int64_t, bool, int, int32_t> best;
    for (size_t i = 0; i < rank.ready.size(); ++i) {
      const FillerStage& filler = rank.ready[i];
      const int microbatch = MicrobatchOf(filler.pair);
      if (!begun_[microbatch] && num_begun_ >= rule_.most_begun) continue;
      const int64_t start =
          std::max(rank.free_ns, Of(filler.pair, filler.forward).ready_ns);
      if (start >= order_ns) continue;
      if (rule_.waits &&
          start + LengthOf(filler.pair, filler.forward) > order_ns) {
        continue;
      }
      const std::tuple key(start, filler.forward == rule_.backward_first,
                           microbatch, filler.pair);
      if (rank.choice >= 0 && key >= best) continue;
      best = key;
      rank.choice = static_cast<int>(i);
      rank.start_ns = start;
    }
  }

  void Execute(int r) {
    Rank& rank = ranks_[r];
    int pair = 0;
    bool forward = true;
    if (rank.choice < 0) {
      const ScheduledStage& stage = order_.ranks[r][rank.next++];
      schedule_.ranks[r].push_back(stage);
      pair = graph_.sweep_first_pair[stage.sweep] + stage.stage;
      forward = stage.kind == StageKind::kForward;
    } else {
      pair = rank.ready[rank.choice].pair;
      forward = rank.ready[rank.choice].forward;
      rank.ready.erase(rank.ready.begin() + rank.choice);
      schedule_.ranks[r].push_back(
          {forward ? StageKind::kForward : StageKind::kBackward,
           graph_.pair_sweep[pair], graph_.stage_index(pair), 0});
      CountFiller(MicrobatchOf(pair));
    }
    rank.stale = true;
    rank.free_ns = rank.start_ns + LengthOf(pair, forward);
    if (forward) {
      for (const GraphEdge& edge : graph_.consumers_of(pair)) {
        Feed(edge.pair, true, rank.free_ns + edge.delay_ns);
      }
      if (graph_.has_backward(pair)) Feed(pair, false, rank.free_ns);
    } else {
      for (const GraphEdge& edge : graph_.producers_of(pair)) {
        if (graph_.has_backward(edge.pair)) {
          Feed(edge.pair, false, rank.free_ns + edge.delay_ns);
        }
      }
    }
  }

  void CountFiller(int microbatch) {
    if (!begun_[microbatch]) {
      begun_[microbatch] = true;
      ++num_begun_;
    }
    if (--fillers_left_[microbatch] == 0) --num_begun_;
    for (Rank& rank : ranks_) rank.stale = true;
  }

  const Problem& problem_;
  const ProblemGraph& graph_;
  const Schedule& order_;
  const BubbleRule& rule_;
  std::vector<bool> in_order_;                 // [sweep]
  std::vector<Readiness> forward_, backward_;  // [pair]
  std::vector<Rank> ranks_;
  std::vector<int> fillers_left_;  // [microbatch]: stages
  std::vector<bool> begun_;        // [microbatch]
  int num_begun_ = 0;
  Schedule schedule_;
};

}  // namespace

std::optional<Schedule> FillBubbles(const Problem& problem,
                                    const ProblemGraph& graph,
                                    const Schedule& order,
                                    const BubbleRule& rule) {
  return Filler(problem, graph, order, rule).Run();
}

}  // namespace pipeweaver::search
