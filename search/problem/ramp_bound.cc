// The bound by filling and draining; see ramp_bound.h.

#include "search/problem/ramp_bound.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <limits>
#include <utility>
#include <vector>

#include "absl/numeric/int128.h"
#include "search/problem/disjoint_sets.h"
#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"

namespace pipeweaver::search {
namespace {

// How many p are looked at, of problems of how many pairs and groups on their
// rank, and how often a look may extend a filling: some 5 ms for all of it.
constexpr size_t kMostLooks = 4;
constexpr int kMostPairs = 1'000'000;
constexpr size_t kMostGroups = 256;
constexpr int64_t kMostExtended = 60'000;
// How many parts of the idle time are told apart, how finely makespans are, and
// how many ways to fill both ramps are kept. More are taken for better ones.
constexpr int kMostParts = 64;
constexpr uint64_t kPrecision = 1 << 14;
constexpr size_t kMostFillings = 64;

constexpr uint64_t kImpossible = std::numeric_limits<uint64_t>::max();

uint64_t LessOrNothing(uint64_t a, uint64_t b) { return a > b ? a - b : 0; }

uint64_t Part(uint64_t of, uint64_t part, uint64_t whole) {
  return static_cast<uint64_t>(absl::uint128(of) * part / whole);
}

// What a group has to do with one end of the schedule: the start, or, with time
// reversed, the end, where its B are what its F are at the start.
struct Ramp {
  uint64_t way = 0;   // the longest of its F
  uint64_t fill = 0;  // its B
  uint64_t toll = 0;  // of its F
};

bool FillsMoreForItsToll(const Ramp& a, const Ramp& b) {
  return absl::uint128(a.fill) * b.toll > absl::uint128(b.fill) * a.toll;
}

// One end of the schedule for the rank of a pair p.
struct End {
  uint64_t head = 0;          // before the rank's first stage
  uint64_t way = 0;           // of p
  uint64_t excess = 0;        // what takes no toll
  std::vector<Ramp> ramps;    // [group]: all but p's own, in the same order
  std::vector<Ramp> by_toll;  // those that fill most for their toll first

  // What is to be filled before a stage that comes by `its_way`, where the rank
  // is idle for `idle`.
  uint64_t Need(uint64_t its_way, uint64_t idle) const {
    return LessOrNothing(LessOrNothing(its_way, idle), excess);
  }

  // The least toll of groups that fill `need`, the last in part.
  uint64_t LeastToll(uint64_t need) const {
    uint64_t toll = 0;
    for (const Ramp& ramp : by_toll) {
      if (need == 0) break;
      if (need >= ramp.fill) {
        toll += ramp.toll;
        need -= ramp.fill;
        continue;
      }
      // Tolls are whole numbers.
      const uint64_t rest = ramp.fill - need;
      return toll + ramp.toll - Part(ramp.toll, rest, ramp.fill);
    }
    return need == 0 ? toll : kImpossible;
  }
};

// What the ramps at both ends are filled with.
struct Filling {
  uint64_t start = 0, end = 0;
};

// Fillings of which none is at least another: ever less at the start and more
// at the end.
class Fillings {
 public:
  // Each may have `more` at the start if it has what is to be `before` there,
  // or the same at the end; no end counts for more than `most`.
  void Extend(const Filling& before, const Filling& more, const Filling& most) {
    at_start_.clear();
    at_end_.clear();
    for (const Filling& filling : fillings_) {
      if (filling.start >= before.start && filling.start < most.start) {
        at_start_.push_back(
            {std::min(filling.start + more.start, most.start), filling.end});
      }
      if (filling.end >= before.end && filling.end < most.end) {
        at_end_.push_back(
            {filling.start, std::min(filling.end + more.end, most.end)});
      }
    }
    Add(at_start_);
    Add(at_end_);
    while (fillings_.size() > kMostFillings) TakeTwoForABetterOne();
  }

  size_t size() const { return fillings_.size(); }

  bool Reach(const Filling& most) const {
    return std::any_of(
        fillings_.begin(), fillings_.end(), [&most](const Filling& filling) {
          return filling.start >= most.start && filling.end >= most.end;
        });
  }

 private:
  // Of `more`, no start is greater than the one before it, and no end less.
  void Add(const std::vector<Filling>& more) {
    merged_.resize(fillings_.size() + more.size());
    std::merge(fillings_.begin(), fillings_.end(), more.begin(), more.end(),
               merged_.begin(), [](const Filling& a, const Filling& b) {
                 return a.start > b.start;
               });
    fillings_.clear();
    for (const Filling& filling : merged_) {
      if (!fillings_.empty()) {
        if (filling.end <= fillings_.back().end) continue;
        if (filling.start == fillings_.back().start) fillings_.pop_back();
      }
      fillings_.push_back(filling);
    }
  }

  void TakeTwoForABetterOne() {
    const size_t pairs = fillings_.size() / 2;
    for (size_t i = 0; i < pairs; ++i) {
      fillings_[i] = {fillings_[2 * i].start, fillings_[2 * i + 1].end};
    }
    if (fillings_.size() % 2 != 0) fillings_[pairs] = fillings_.back();
    fillings_.resize(fillings_.size() - pairs);
  }

  std::vector<Filling> fillings_ = {{}};  // nothing is filled
  std::vector<Filling> at_start_, at_end_, merged_;
};

// Of whole numbers.
struct Range {
  uint64_t first = 0, last = 0;
};

// All that bounds the makespan for one pair p.
struct Look {
  uint64_t work = 0;   // of the rank
  uint64_t chain = 0;  // from the start of F to the end of B
  End start, end;
  int64_t extended = 0;  // fillings, so far

  uint64_t WithoutRamps() const {
    return std::max(
        work + std::max(start.head, start.way) + std::max(end.head, end.way),
        chain + start.way + end.way);
  }

  // Whether the ramps can be filled when the rank is idle for so long at the
  // start and at the end; true where that would take too long to find out.
  bool CanFill(uint64_t start_idle, uint64_t end_idle) {
    const Filling most = {start.Need(start.way, start_idle),
                          end.Need(end.way, end_idle)};
    Fillings fillings;
    for (size_t i = 0; i < start.ramps.size(); ++i) {
      extended += static_cast<int64_t>(fillings.size());
      if (extended > kMostExtended || fillings.Reach(most)) return true;
      const Ramp &up = start.ramps[i], &down = end.ramps[i];
      fillings.Extend(
          {start.Need(up.way, start_idle), end.Need(down.way, end_idle)},
          {up.fill, down.fill}, most);
    }
    return fillings.Reach(most);
  }

  // False where no schedule has a makespan of `makespan` or less.
  bool IsPossible(uint64_t makespan) {
    const uint64_t ends = start.head + end.head;
    const uint64_t way = chain + start.way + end.way;
    if (makespan < work + ends || makespan < way) return false;
    // How much of the idle time beyond the heads is at the start: parts of all
    // that there is, halved until they are impossible.
    const uint64_t idle = makespan - work - ends, toll = makespan - way;
    std::vector<Range> parts = {{0, idle}};
    for (int tried = 0; !parts.empty(); ++tried) {
      const Range part = parts.back();
      parts.pop_back();
      if (!CanBeIdle(start.head + part.last, end.head + idle - part.first,
                     toll)) {
        continue;
      }
      if (part.first == part.last || tried >= kMostParts) return true;
      const uint64_t middle = part.first + (part.last - part.first) / 2;
      parts.push_back({middle + 1, part.last});
      parts.push_back({part.first, middle});
    }
    return false;
  }

  // Whether the rank can be idle for no longer at the start and at the end,
  // where the long way leaves time for `toll`.
  bool CanBeIdle(uint64_t start_idle, uint64_t end_idle, uint64_t toll) {
    const uint64_t start_toll =
        start.LeastToll(start.Need(start.way, start_idle));
    return start_toll <= toll &&
           end.LeastToll(end.Need(end.way, end_idle)) <= toll - start_toll &&
           CanFill(start_idle, end_idle);
  }

  // The least makespan not found impossible, or `known`.
  uint64_t Bound(uint64_t known) {
    uint64_t possible = WithoutRamps();
    if (possible <= known || IsPossible(known)) return known;
    uint64_t impossible = known;
    while (possible - impossible > 1 + impossible / kPrecision) {
      const uint64_t middle = impossible + (possible - impossible) / 2;
      (IsPossible(middle) ? possible : impossible) = middle;
    }
    return impossible + 1;
  }
};

class RampBound {
 public:
  RampBound(const ProblemGraph& graph, const PathBound& path,
            const std::vector<int32_t>& routes)
      : graph_(graph),
        path_(path),
        routes_(routes),
        pairs_on_rank_(graph.ranks) {
    for (int p = 0; p < graph.pairs; ++p) {
      pairs_on_rank_[graph.pair_rank[p]].push_back(p);
    }
    for (int r = 0; r < graph.ranks; ++r) {
      if (!pairs_on_rank_[r].empty() && IsPlain(r)) plain_ranks_.push_back(r);
    }
  }

  uint64_t Compute(uint64_t known) {
    if (plain_ranks_.empty() || graph_.pairs > kMostPairs) return known;
    FindWays();
    chain_ns_ = ChainsOf(graph_, path_);
    FindGroups();
    for (const int32_t p : Candidates(known)) {
      known = std::max(known, LookAt(p).Bound(known));
    }
    return known;
  }

 private:
  // The same for F and for B.
  struct Way {
    uint64_t ns = 0;    // of the sweep's stages and transfers before
    uint64_t toll = 0;  // the least over the sweep's ranks up to this one
  };

  uint64_t Least(int pair, int end) const {
    const LeastLengths& least = path_.least[pair];
    return end == 0 ? least.forward : least.gradient;
  }

  void FindWays() {
    ways_.resize(graph_.pairs);
    for (int p = 0; p < graph_.pairs; ++p) {
      for (const int end : {0, 1}) {
        Way& way = ways_[p][end];
        way.toll = Least(p, end);
        if (graph_.stage_index(p) == 0) continue;
        const Way& before = ways_[p - 1][end];
        way.ns = before.ns + Least(p - 1, end) + TransferAfter(graph_, p - 1);
        way.toll = std::min(way.toll, before.toll);
      }
    }
  }

  // Numbers groups by one of their pairs: components with one last stage, and
  // of others each sweep.
  void FindGroups() {
    DisjointSets components(graph_.pairs);
    for (int p = 0; p < graph_.pairs; ++p) {
      for (const GraphEdge& edge : graph_.producers_of(p)) {
        components.Join(p, edge.pair);
      }
    }
    std::vector<int32_t> last_stages(graph_.pairs, 0);  // [component]
    for (int p = 0; p < graph_.pairs; ++p) {
      if (graph_.consumers_of(p).size() == 0) ++last_stages[components.Find(p)];
    }
    group_.resize(graph_.pairs);
    for (int p = 0; p < graph_.pairs; ++p) {
      const int32_t component = components.Find(p);
      group_[p] = last_stages[component] == 1
                      ? component
                      : graph_.sweep_first_pair[graph_.pair_sweep[p]];
    }
  }

  // Whether no backward there is split, and a pair's least lengths are one
  // choice's.
  bool IsPlain(int rank) const {
    return std::all_of(pairs_on_rank_[rank].begin(), pairs_on_rank_[rank].end(),
                       [this](int p) {
                         const LeastLengths& least = path_.least[p];
                         return graph_.mode[p] != PairMode::kSplit &&
                                least.work == least.forward + least.gradient;
                       });
  }

  // Of every group the pair that waits longest if nothing fills, where groups
  // are not too many; of those, the ones that wait longest.
  std::vector<int32_t> Candidates(uint64_t known) const {
    const auto unfilled = [this](int p) {
      const int rank = graph_.pair_rank[p];
      return path_.work[rank] + std::max(path_.head[rank], ways_[p][0].ns) +
             std::max(path_.tail[rank], ways_[p][1].ns);
    };
    std::vector<int32_t> best(graph_.pairs, -1), seen_on(graph_.pairs, -1);
    for (const int32_t rank : plain_ranks_) {
      size_t groups = 0;
      for (const int p : pairs_on_rank_[rank]) {
        if (std::exchange(seen_on[group_[p]], rank) != rank) ++groups;
      }
      if (groups > kMostGroups) continue;
      for (const int p : pairs_on_rank_[rank]) {
        int32_t& to = best[group_[p]];
        if (graph_.has_backward(p) && unfilled(p) > known &&
            (to < 0 || unfilled(p) > unfilled(to))) {
          to = p;
        }
      }
    }
    std::erase(best, -1);
    std::stable_sort(best.begin(), best.end(), [&unfilled](int a, int b) {
      return unfilled(a) > unfilled(b);
    });
    if (best.size() > kMostLooks) best.resize(kMostLooks);
    return best;
  }

  // The transfers on the way of `p` as they are at least where another pair is
  // in the way: it follows on the rank before, with its own stage and transfer,
  // and has the next rank first.
  std::vector<uint64_t> LeastTransfers(int p, int end) const {
    const int stages = graph_.stage_index(p);
    std::vector<uint64_t> least(stages, kImpossible);
    for (const int q : pairs_on_rank_[graph_.pair_rank[p]]) {
      if (routes_[q] != routes_[p]) continue;
      for (int k = 0; k < stages; ++k) {
        const int before = q - stages + k;
        least[k] = std::min(least[k],
                            TransferAfter(graph_, before) + Least(before, end));
      }
    }
    return least;
  }

  Look LookAt(int p) const {
    const int rank = graph_.pair_rank[p], stages = graph_.stage_index(p);
    Look look;
    look.work = path_.work[rank];
    look.chain = chain_ns_[p];
    look.start.head = path_.head[rank];
    look.end.head = path_.tail[rank];
    std::vector<int32_t> number(graph_.pairs, -1);  // [group]
    for (const int side : {0, 1}) {
      End& end = side == 0 ? look.start : look.end;
      const std::vector<uint64_t> transfers = LeastTransfers(p, side);
      for (const int q : pairs_on_rank_[rank]) {
        const int group = group_[q];
        const bool same_way = routes_[q] == routes_[p];
        const uint64_t own = Least(q, side), other = Least(q, 1 - side);
        const uint64_t toll = same_way ? ways_[q][side].toll : 0;
        uint64_t way = 0;
        for (int k = 0; same_way && k < stages; ++k) {
          const int before = q - stages + k;
          way += Least(before, side) +
                 std::min(TransferAfter(graph_, before), transfers[k]);
        }
        end.excess += own - toll;
        if (q == p) end.way = way;
        if (group == group_[p]) continue;
        if (number[group] < 0) {
          number[group] = static_cast<int32_t>(look.start.ramps.size());
          look.start.ramps.emplace_back();
          look.end.ramps.emplace_back();
        }
        Ramp& ramp = end.ramps[number[group]];
        // A pair without a backward has no way back.
        if (side == 0 || graph_.has_backward(q)) {
          ramp.way = std::max(ramp.way, way);
        }
        ramp.fill += other;
        ramp.toll += toll;
      }
      std::copy_if(end.ramps.begin(), end.ramps.end(),
                   std::back_inserter(end.by_toll),
                   [](const Ramp& ramp) { return ramp.fill > 0; });
      std::sort(end.by_toll.begin(), end.by_toll.end(), FillsMoreForItsToll);
    }
    SortByWay(look);
    return look;
  }

  // Groups in the order of rising way at the start, and none with a longer way
  // at the end than a later one: which takes the ways there for less.
  static void SortByWay(Look& look) {
    std::vector<std::pair<Ramp, Ramp>> ramps;
    for (size_t i = 0; i < look.start.ramps.size(); ++i) {
      ramps.emplace_back(look.start.ramps[i], look.end.ramps[i]);
    }
    std::stable_sort(
        ramps.begin(), ramps.end(),
        [](const auto& a, const auto& b) { return a.first.way < b.first.way; });
    uint64_t least = kImpossible;
    for (size_t i = ramps.size(); i-- > 0;) {
      least = std::min(least, ramps[i].second.way);
      look.start.ramps[i] = ramps[i].first;
      look.end.ramps[i] = ramps[i].second;
      look.end.ramps[i].way = least;
    }
  }

  const ProblemGraph& graph_;
  const PathBound& path_;
  const std::vector<int32_t>& routes_;
  std::vector<std::vector<int32_t>> pairs_on_rank_;
  std::vector<int32_t> plain_ranks_;
  std::vector<std::array<Way, 2>> ways_;  // [pair]: of F, of B
  std::vector<uint64_t> chain_ns_;        // [pair]: ChainsOf
  std::vector<int32_t> group_;            // [pair]
};

}  // namespace

uint64_t RampLowerBound(const ProblemGraph& graph, const PathBound& path,
                        const std::vector<int32_t>& routes, uint64_t known) {
  return RampBound(graph, path, routes).Compute(known);
}

}  // namespace pipeweaver::search
