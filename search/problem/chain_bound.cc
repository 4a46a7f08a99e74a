// The bound by one long chain; see chain_bound.h.

#include "search/problem/chain_bound.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "absl/numeric/int128.h"
#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"

namespace pipeweaver::search {
namespace {

// Chains looked at, and pairs and edges over all of them: about a tenth of a
// second at most.
constexpr size_t kMostChains = 16;
constexpr size_t kMostLookedAt = 8'000'000;

// What a pair takes off the wait for the chain, more than 0, and what it adds
// to the chain.
struct Filler {
  uint64_t fill = 0, toll = 0;
};

bool FillsMoreForItsToll(const Filler& a, const Filler& b) {
  return absl::uint128(a.fill) * b.toll > absl::uint128(b.fill) * a.toll;
}

uint64_t LessOrNothing(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

uint64_t Part(uint64_t of, uint64_t part, uint64_t whole) {
  return static_cast<uint64_t>(absl::uint128(of) * part / whole);
}

// The best of `fillers`, the last in part, that fill `most` together.
std::vector<Filler> BestThatFill(std::vector<Filler> fillers, uint64_t most) {
  std::sort(fillers.begin(), fillers.end(), FillsMoreForItsToll);
  std::vector<Filler> best;
  for (const Filler& filler : fillers) {
    if (most == 0) break;
    const uint64_t fill = std::min(filler.fill, most);
    best.push_back({fill, Part(filler.toll, fill, filler.fill)});
    most -= fill;
  }
  return best;
}

class ChainBound {
 public:
  ChainBound(const ProblemGraph& graph, const PathBound& path,
             const std::vector<int32_t>& routes)
      : graph_(graph), path_(path), routes_(routes), ends_(graph.pairs) {
    for (int p = 0; p < graph.pairs; ++p) {
      Ends& ends = ends_[p];
      ends.toll = path.least[p].forward;
      ends.toll_back = path.least[p].gradient;
      if (graph.stage_index(p) == 0) continue;
      const Ends& before = ends_[p - 1];
      const uint64_t transfer = TransferAfter(graph, p - 1);
      ends.way = before.way + path.least[p - 1].forward + transfer;
      ends.back = before.back + path.least[p - 1].gradient + transfer;
      ends.toll = std::min(ends.toll, before.toll);
      ends.toll_back = std::min(ends.toll_back, before.toll_back);
    }
    FindChains();
  }

  uint64_t Compute(uint64_t known) {
    std::vector<int32_t> candidates = Candidates(known);
    const size_t most = std::clamp<size_t>(
        kMostLookedAt / (1 + graph_.pairs + graph_.producers.size()), 1,
        kMostChains);
    if (candidates.size() > most) candidates.resize(most);
    for (const int32_t p : candidates) {
      known = std::max(known, BoundFor(p));
    }
    return known;
  }

 private:
  struct Ends {
    // To the pair's rank: the sweep's stages and transfers before it.
    uint64_t way = 0, back = 0;
    // Of its F and its B: the least over the sweep's ranks up to its own.
    uint64_t toll = 0, toll_back = 0;
  };

  void FindChains() {
    chain_ns_.assign(graph_.pairs, 0);
    for (int i = graph_.pairs - 1; i >= 0; --i) {
      const int p = graph_.topological[i];
      for (const GraphEdge& edge : graph_.consumers_of(p)) {
        chain_ns_[p] = std::max(
            chain_ns_[p],
            chain_ns_[edge.pair] + 2 * static_cast<uint64_t>(edge.delay_ns));
      }
      chain_ns_[p] += path_.least[p].forward + path_.least[p].gradient;
    }
  }

  // The bound for `p` if nothing fills.
  uint64_t Unfilled(int p) const {
    const int rank = graph_.pair_rank[p];
    return path_.work[rank] + std::max(path_.head[rank], ends_[p].way) +
           std::max(path_.tail[rank], ends_[p].back);
  }
  uint64_t ChainWithEnds(int p) const {
    return chain_ns_[p] + ends_[p].way + ends_[p].back;
  }

  // Of every sweep the pair that is bounded best if nothing fills, longest
  // chains first.
  std::vector<int32_t> Candidates(uint64_t known) const {
    std::vector<uint8_t> splits(graph_.ranks, 0);
    for (int p = 0; p < graph_.pairs; ++p) {
      if (graph_.mode[p] == PairMode::kSplit) splits[graph_.pair_rank[p]] = 1;
    }
    std::vector<int32_t> candidates;
    for (int s = 0; s < graph_.sweeps; ++s) {
      int best = -1;
      for (int p = graph_.sweep_first_pair[s] + 1;
           p < graph_.sweep_first_pair[s + 1]; ++p) {
        if (!graph_.has_backward(p) || splits[graph_.pair_rank[p]] != 0 ||
            Unfilled(p) <= known) {
          continue;
        }
        if (best < 0 || Unfilled(p) > Unfilled(best)) best = p;
      }
      if (best >= 0) candidates.push_back(best);
    }
    std::stable_sort(
        candidates.begin(), candidates.end(),
        [this](int a, int b) { return ChainWithEnds(a) > ChainWithEnds(b); });
    return candidates;
  }

  // Marks the pairs that descend from p, and those that share a descendant with
  // it, so that their B descend from its F.
  void Descend(int p) {
    descends_.assign(graph_.pairs, 0);
    meets_.assign(graph_.pairs, 0);
    descends_[p] = 1;
    for (const int q : graph_.topological) {
      for (const GraphEdge& edge : graph_.producers_of(q)) {
        descends_[q] |= descends_[edge.pair];
      }
    }
    for (int i = graph_.pairs - 1; i >= 0; --i) {
      const int q = graph_.topological[i];
      meets_[q] = descends_[q];
      for (const GraphEdge& edge : graph_.consumers_of(q)) {
        meets_[q] |= meets_[edge.pair];
      }
    }
  }

  // Lowers the transfers on the way of `p` to what they are at least where `q`,
  // over the same ranks, is in its way: q follows it on the rank before, with
  // its own stage and transfer, and has the next rank before it.
  void ShortenTransfers(int p, int q, std::vector<uint64_t>& transfer,
                        std::vector<uint64_t>& transfer_back) const {
    const int stages = graph_.stage_index(p);
    const int first = q - graph_.stage_index(q);
    for (int k = 0; k < stages; ++k) {
      const uint64_t own = TransferAfter(graph_, first + k);
      transfer[k] = std::min(transfer[k], own + path_.least[first + k].forward);
      transfer_back[k] =
          std::min(transfer_back[k], own + path_.least[first + k].gradient);
    }
  }

  uint64_t BoundFor(int p) {
    Descend(p);
    const int rank = graph_.pair_rank[p], stages = graph_.stage_index(p);
    std::vector<uint64_t> transfer(stages), transfer_back;
    for (int k = 0; k < stages; ++k) {
      transfer[k] = TransferAfter(graph_, p - stages + k);
    }
    transfer_back = transfer;
    std::vector<Filler> fillers, fillers_back;
    for (int q = 0; q < graph_.pairs; ++q) {
      if (graph_.pair_rank[q] != rank || descends_[q] != 0) continue;
      const bool same_way = routes_[q] == routes_[p];
      if (same_way) ShortenTransfers(p, q, transfer, transfer_back);
      const LeastLengths& least = path_.least[q];
      const uint64_t toll = same_way ? ends_[q].toll : 0;
      const uint64_t toll_back = same_way ? ends_[q].toll_back : 0;
      uint64_t fill = least.work, fill_back = least.work;
      if (meets_[q] != 0) {  // one of F and B only
        fill -= least.gradient;
        fill_back -= least.forward;
      }
      if (fill > toll) fillers.push_back({fill - toll, toll});
      // An F without a backward that comes before B of p, never after it.
      if (!graph_.has_backward(q) && meets_[q] != 0) continue;
      if (fill_back > toll_back) {
        fillers_back.push_back({fill_back - toll_back, toll_back});
      }
    }
    uint64_t way = 0, back = 0;
    for (int k = 0; k < stages; ++k) {
      way += path_.least[p - stages + k].forward + transfer[k];
      back += path_.least[p - stages + k].gradient + transfer_back[k];
    }
    const uint64_t head = path_.head[rank], tail = path_.tail[rank];
    std::vector<Filler> best =
        BestThatFill(std::move(fillers), LessOrNothing(way, head));
    const std::vector<Filler> best_back =
        BestThatFill(std::move(fillers_back), LessOrNothing(back, tail));
    best.insert(best.end(), best_back.begin(), best_back.end());
    std::sort(best.begin(), best.end(), FillsMoreForItsToll);

    uint64_t by_work =
        path_.work[rank] + std::max(head, way) + std::max(tail, back);
    uint64_t by_chain = chain_ns_[p] + way + back;
    for (const Filler& filler : best) {
      if (by_work <= by_chain) break;
      const uint64_t apart = by_work - by_chain;
      if (apart <= filler.fill + filler.toll) {
        return by_chain + Part(filler.toll, apart, filler.fill + filler.toll);
      }
      by_work -= filler.fill;
      by_chain += filler.toll;
    }
    return std::max(by_work, by_chain);
  }

  const ProblemGraph& graph_;
  const PathBound& path_;
  const std::vector<int32_t>& routes_;
  std::vector<Ends> ends_;  // [pair]
  // The longest path from the start of F to the end of B, [pair].
  std::vector<uint64_t> chain_ns_;
  std::vector<uint8_t> descends_, meets_;  // [pair]
};

}  // namespace

uint64_t ChainLowerBound(const ProblemGraph& graph, const PathBound& path,
                         const std::vector<int32_t>& routes, uint64_t known) {
  return ChainBound(graph, path, routes).Compute(known);
}

}  // namespace pipeweaver::search
