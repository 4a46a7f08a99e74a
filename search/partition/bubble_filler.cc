// A simulation in which the rank that can start first takes its next stage.

#include "search/partition/bubble_filler.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <tuple>
#include <utility>

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
        ranks_(graph.ranks),
        starts_ns_(graph.ranks, kNever) {
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
    for (int r = 0; r < graph_.ranks; ++r) MarkStale(r);
    for (; left > 0; --left) {
      for (const int r : stale_) Choose(r);
      stale_.clear();
      const auto first = std::min_element(starts_ns_.begin(), starts_ns_.end());
      if (*first == kNever) return std::nullopt;
      Execute(static_cast<int>(first - starts_ns_.begin()));
    }
    return std::move(schedule_);
  }

 private:
  struct Readiness {
    int waits = 0;
    int64_t ready_ns = 0;
  };
  struct FillerStage {
    int64_t ready_ns = 0;
    int64_t length_ns = 0;
    int microbatch = 0;
    int32_t pair = 0;
    bool forward = true;
  };
  struct Rank {
    size_t next = 0;  // in its order
    int64_t free_ns = 0;
    std::vector<FillerStage> ready;
    // What it does next; out of date where `stale`.
    bool stale = false;
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

  // What the rank does next has to be chosen again.
  void MarkStale(int r) {
    if (ranks_[r].stale) return;
    ranks_[r].stale = true;
    stale_.push_back(r);
  }

  // All inputs of the stage have been computed.
  void Arrive(int pair, bool forward) {
    const int r = graph_.pair_rank[pair];
    MarkStale(r);
    if (!in_order_[graph_.pair_sweep[pair]]) {
      ranks_[r].ready.push_back({Of(pair, forward).ready_ns,
                                 LengthOf(pair, forward), MicrobatchOf(pair),
                                 pair, forward});
    }
  }

  void Feed(int pair, bool forward, int64_t ns) {
    Readiness& readiness = forward ? forward_[pair] : backward_[pair];
    readiness.ready_ns = std::max(readiness.ready_ns, ns);
    if (--readiness.waits == 0) Arrive(pair, forward);
  }

  void Choose(int r) {
    Rank& rank = ranks_[r];
    int64_t& start_ns = starts_ns_[r];
    rank.stale = false;
    start_ns = kNever;
    rank.choice = -1;
    if (rank.next < order_.ranks[r].size()) {
      const ScheduledStage& stage = order_.ranks[r][rank.next];
      const Readiness& readiness =
          Of(graph_.sweep_first_pair[stage.sweep] + stage.stage,
             stage.kind == StageKind::kForward);
      if (readiness.waits == 0) {
        start_ns = std::max(rank.free_ns, readiness.ready_ns);
      }
    }
    const int64_t order_ns = start_ns;
    if (order_ns == rank.free_ns) return;  // no filler starts sooner
    // Of the fillers that can start first, by microbatch.
    std::tuple<int64_t, bool, int, int32_t> best;
    for (size_t i = 0; i < rank.ready.size(); ++i) {
      const FillerStage& filler = rank.ready[i];
      if (!may_begin() && !begun_[filler.microbatch]) continue;
      const int64_t start = std::max(rank.free_ns, filler.ready_ns);
      if (start >= order_ns) continue;
      if (rule_.waits && start + filler.length_ns > order_ns) continue;
      const std::tuple key(start, filler.forward == rule_.backward_first,
                           filler.microbatch, filler.pair);
      if (rank.choice >= 0 && key >= best) continue;
      best = key;
      rank.choice = static_cast<int>(i);
      start_ns = start;
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
    MarkStale(r);
    rank.free_ns = starts_ns_[r] + LengthOf(pair, forward);
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

  bool may_begin() const { return num_begun_ < rule_.most_begun; }

  void CountFiller(int microbatch) {
    const bool could_begin = may_begin();
    if (!begun_[microbatch]) {
      begun_[microbatch] = true;
      ++num_begun_;
    }
    if (--fillers_left_[microbatch] == 0) --num_begun_;
    // A microbatch that may begin or has begun changes no rank's choice while
    // others may begin, too.
    if (may_begin() == could_begin) return;
    for (int r = 0; r < graph_.ranks; ++r) MarkStale(r);
  }

  const Problem& problem_;
  const ProblemGraph& graph_;
  const Schedule& order_;
  const BubbleRule& rule_;
  std::vector<bool> in_order_;                 // [sweep]
  std::vector<Readiness> forward_, backward_;  // [pair]
  std::vector<Rank> ranks_;
  std::vector<int> stale_;  // ranks, each once
  // [rank]: when it does what it does next; kNever: nothing.
  std::vector<int64_t> starts_ns_;
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
