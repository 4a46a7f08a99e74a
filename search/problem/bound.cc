// Lower bounds; see bound.h.

#include "search/problem/bound.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "search/problem/memory_bound.h"
#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"
#include "search/problem/ramp_bound.h"

namespace pipeweaver::search {
namespace {

constexpr uint64_t kUnset = PathBound::kUnset;
// By FlowLowerBound over all ranks, for some tenths of a second.
constexpr int kMostPairsLookedAt = 20'000'000;

// Idle time at one end of a rank's order.
struct EndIdle {
  uint64_t ns = 0;
  bool nothing_taken_off = false;
  RankEnd exact;  // where nothing_taken_off: the same by what each job counts
};

// The claim of FlowLowerBound for rank b: at the start (F), or at the end with
// time reversed (B, `reversed`).
class FlowEnd {
  static constexpr size_t kMostThresholds = 12;

 public:
  FlowEnd(const ProblemGraph& graph, const PathBound& path,
          const std::vector<int32_t>& route, bool reversed)
      : graph_(graph), path_(path), route_(route), reversed_(reversed) {
    way_.assign(graph.pairs, 0);
    for (int p = 1; p < graph.pairs; ++p) {
      if (graph.stage_index(p) == 0) continue;
      way_[p] = way_[p - 1] + Length(p - 1) + TransferAfter(graph_, p - 1);
    }
  }

  // No idle time where there is none above `known_ns`.
  EndIdle Compute(int rank, uint64_t known_ns) {
    EndIdle best;
    std::vector<int32_t> jobs;
    for (int p = 0; p < graph_.pairs; ++p) {
      if (graph_.pair_rank[p] != rank) continue;
      // A weight gradient can fill the end.
      if (reversed_ && graph_.mode[p] == PairMode::kSplit) return best;
      jobs.push_back(p);
    }
    if (jobs.empty()) return best;
    std::vector<uint64_t> thresholds;
    for (const int p : jobs) {
      if (IsJob(p)) thresholds.push_back(way_[p]);
    }
    std::sort(thresholds.begin(), thresholds.end());
    thresholds.erase(std::unique(thresholds.begin(), thresholds.end()),
                     thresholds.end());
    // Ways come in clusters, one a module and segment: the best set X is mostly
    // all that comes from one on, so the widest gaps between ways are tried,
    // and some in regular intervals.
    std::vector<size_t> tried(thresholds.size());
    std::iota(tried.begin(), tried.end(), size_t{0});
    if (thresholds.size() > 2 * kMostThresholds) {
      std::partial_sort(
          tried.begin() + 1, tried.begin() + kMostThresholds, tried.end(),
          [&](size_t i, size_t j) {
            return std::pair(thresholds[j] - thresholds[j - 1], i) <
                   std::pair(thresholds[i] - thresholds[i - 1], j);
          });
      tried.resize(kMostThresholds);
      const size_t step = 1 + thresholds.size() / kMostThresholds;
      for (size_t i = step; i < thresholds.size(); i += step) {
        tried.push_back(i);
      }
    }
    // A rank idles no longer than the shortest way of X takes.
    std::erase_if(tried, [&](size_t i) { return thresholds[i] <= known_ns; });
    if (tried.empty()) return best;
    std::vector<int> shortest(tried.size(), -1);  // of each X
    for (size_t i = 0; i < tried.size(); ++i) {
      for (const int p : jobs) {
        if (!IsJob(p) || way_[p] < thresholds[tried[i]]) continue;
        if (shortest[i] < 0 || way_[p] < way_[shortest[i]]) shortest[i] = p;
      }
    }
    in_x_.assign(graph_.pairs, 0);
    for (const int p : jobs) {
      if (!IsJob(p)) continue;
      for (size_t i = 0; i < tried.size(); ++i) {
        if (way_[p] >= thresholds[tried[i]] && SameWay(p, shortest[i])) {
          in_x_[p] |= Set{1} << i;
        }
      }
    }
    Descend();
    for (size_t i = 0; i < tried.size(); ++i) {
      if (thresholds[tried[i]] <= best.ns) continue;
      EndIdle idle = IdleFor(jobs, shortest[i], way_[shortest[i]],
                             static_cast<int>(i), best.ns);
      if (idle.ns > best.ns) best = std::move(idle);
    }
    return best;
  }

 private:
  // Of sets X, by their numbers; a bit for each of those tried.
  using Set = uint32_t;
  static_assert(2 * kMostThresholds <= std::numeric_limits<Set>::digits);

  bool IsJob(int p) const { return !reversed_ || graph_.has_backward(p); }
  uint64_t Length(int p) const {
    return reversed_ ? path_.least[p].gradient : path_.least[p].forward;
  }
  // The least of the pair's work on its rank but its job.
  uint64_t Rest(int p) const {
    if (reversed_) return path_.least[p].forward;
    uint64_t rest = kUnset;
    for (const GraphChoice& c : graph_.choices_of(p)) {
      uint64_t backward = 0;
      if (graph_.mode[p] == PairMode::kSplit) {
        backward = static_cast<uint64_t>(c.input_grad_ns + c.weight_grad_ns);
        if (c.has_backward()) {
          backward = std::min(backward, static_cast<uint64_t>(c.backward_ns));
        }
      } else if (graph_.mode[p] == PairMode::kWhole) {
        backward = static_cast<uint64_t>(c.backward_ns);
      }
      rest = std::min(rest, backward);
    }
    return rest;
  }

  bool SameWay(int p, int q) const { return route_[p] == route_[q]; }

  // Marks F and gradients that descend from the F of X (reversed: from which
  // the gradients of X descend), for all X at once.
  void Descend() {
    forward_.assign(graph_.pairs, 0);
    gradient_.assign(graph_.pairs, 0);
    if (reversed_) {
      // Ancestors: gradients from producers to consumers, then F back.
      for (const int p : graph_.topological) {
        Set reached = in_x_[p];
        for (const GraphEdge& edge : graph_.producers_of(p)) {
          reached |= gradient_[edge.pair];
        }
        gradient_[p] = reached;
      }
      for (int i = graph_.pairs - 1; i >= 0; --i) {
        const int p = graph_.topological[i];
        forward_[p] = gradient_[p];
        for (const GraphEdge& edge : graph_.consumers_of(p)) {
          forward_[p] |= forward_[edge.pair];
        }
      }
      return;
    }
    for (const int p : graph_.topological) {
      forward_[p] = in_x_[p];
      for (const GraphEdge& edge : graph_.producers_of(p)) {
        forward_[p] |= forward_[edge.pair];
      }
    }
    for (int i = graph_.pairs - 1; i >= 0; --i) {
      const int p = graph_.topological[i];
      if (!graph_.has_backward(p)) continue;
      gradient_[p] = forward_[p];
      for (const GraphEdge& edge : graph_.consumers_of(p)) {
        gradient_[p] |= gradient_[edge.pair];
      }
    }
  }

  // For the X of number `set`, whose shortest member is `x` with `way_ns`: the
  // ways of X are those of `x`. None where there is not more than `known_ns`.
  EndIdle IdleFor(const std::vector<int32_t>& jobs, int x, uint64_t way_ns,
                  int set, uint64_t known_ns) const {
    const auto has = [set](Set sets) { return (sets >> set & 1) != 0; };
    // The least transfers along the way: of X, or of A after its own stage.
    const int first_x = graph_.sweep_first_pair[graph_.pair_sweep[x]];
    std::vector<uint64_t> transfer(x - first_x, kUnset);
    uint64_t taken_off = 0;
    bool clean = true;
    std::vector<uint64_t> most_ns(jobs.size(), kUnset);
    size_t job = 0;
    for (const int p : jobs) {
      uint64_t& most = most_ns[job++];
      if (way_ns <= known_ns + taken_off) return {};
      const bool in_x = has(in_x_[p]);
      const bool job_reached = has(reversed_ ? gradient_[p] : forward_[p]);
      const bool rest_reached = has(reversed_ ? forward_[p] : gradient_[p]);
      const uint64_t work = path_.least[p].work;
      const bool job_in_front = IsJob(p) && !job_reached;
      const bool rest_in_front =
          (reversed_ || graph_.has_backward(p)) && !rest_reached;
      if (!in_x && !job_in_front && !rest_in_front) continue;
      if (rest_in_front || (job_in_front && !SameWay(p, x))) {
        taken_off += work;
        clean = false;
        continue;
      }
      const int first = graph_.sweep_first_pair[graph_.pair_sweep[p]];
      uint64_t shortest = Length(p);
      for (int q = first; q < p; ++q) {
        shortest = std::min(shortest, Length(q));
        uint64_t& least = transfer[q - first];
        least =
            std::min(least, TransferAfter(graph_, q) + (in_x ? 0 : Length(q)));
      }
      if (in_x) continue;
      most = shortest;
      taken_off += work - std::min(work, shortest + Rest(p));
    }
    uint64_t way = kUnset;
    for (const int p : jobs) {
      if (!has(in_x_[p])) continue;
      const int first = graph_.sweep_first_pair[graph_.pair_sweep[p]];
      uint64_t own = 0;
      for (int q = first; q < p; ++q) own += Length(q) + transfer[q - first];
      way = std::min(way, own);
    }
    return {way > taken_off ? way - taken_off : 0, clean,
            clean ? RankEnd{way, std::move(most_ns)} : RankEnd{}};
  }

  const ProblemGraph& graph_;
  const PathBound& path_;
  const std::vector<int32_t>& route_;  // RoutesOf
  const bool reversed_;
  // [pair]: the stages and transfers of its sweep before it.
  std::vector<uint64_t> way_;
  std::vector<Set> in_x_;                // [pair]: the sets X that it is in
  std::vector<Set> forward_, gradient_;  // [pair]: those that it descends from
};

}  // namespace

int64_t LowerBound(const ProblemGraph& graph) {
  return static_cast<int64_t>(ComputePathBound(graph).bound);
}

int64_t FlowLowerBound(const ProblemGraph& graph) {
  return FindLowerBounds(graph).flow_ns;
}

LowerBounds FindLowerBounds(const ProblemGraph& graph) {
  const PathBound path = ComputePathBound(graph);
  const std::vector<int32_t> routes = RoutesOf(graph);
  FlowEnd start(graph, path, routes, /*reversed=*/false);
  FlowEnd end(graph, path, routes, /*reversed=*/true);
  uint64_t bound = path.bound;
  const auto plain_bound = [&](int r) {
    return path.head[r] + path.work[r] + path.tail[r];
  };
  const MemoryBound memory(graph, path);
  std::vector<int> ranks;
  for (int r = 0; r < graph.ranks; ++r) {
    if (path.head[r] != kUnset) ranks.push_back(r);
  }
  const size_t tried =
      std::max<size_t>(1, kMostPairsLookedAt / std::max(1, graph.pairs));
  if (ranks.size() > tried) {
    std::stable_sort(ranks.begin(), ranks.end(), [&](int a, int b) {
      return plain_bound(a) > plain_bound(b);
    });
    ranks.resize(tried);
  }
  for (const int r : ranks) {
    const EndIdle fill = start.Compute(r, path.head[r]);
    const EndIdle drain = end.Compute(r, path.tail[r]);
    const uint64_t head = std::max(path.head[r], fill.ns);
    const uint64_t tail = std::max(path.tail[r], drain.ns);
    bound = std::max({bound, head + path.work[r] + path.tail[r],
                      path.head[r] + path.work[r] + tail});
    if (fill.nothing_taken_off && drain.nothing_taken_off) {
      bound = std::max(bound, head + path.work[r] + tail);
    }
    if (!memory.Matters(r, bound)) continue;
    const RankEnd plain_head = {path.head[r], {}},
                  plain_tail = {path.tail[r], {}};
    bound = std::max(bound, memory.Compute(r, plain_head, plain_tail));
    if (fill.nothing_taken_off) {
      bound = std::max(bound, memory.Compute(r, fill.exact, plain_tail));
    }
    if (drain.nothing_taken_off) {
      bound = std::max(bound, memory.Compute(r, plain_head, drain.exact));
    }
    if (fill.nothing_taken_off && drain.nothing_taken_off) {
      bound = std::max(bound, memory.Compute(r, fill.exact, drain.exact));
    }
  }
  bound = RampLowerBound(graph, path, routes, bound);
  return {static_cast<int64_t>(path.bound), static_cast<int64_t>(bound)};
}

}  // namespace pipeweaver::search
