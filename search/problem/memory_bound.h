// A lower bound for problems that are short of memory, where time must be spent
// to save some. Part of FlowLowerBound (bound.h).

#ifndef SEARCH_PROBLEM_MEMORY_BOUND_H_
#define SEARCH_PROBLEM_MEMORY_BOUND_H_

#include <cstdint>
#include <vector>

#include "search/problem/path_bound.h"
#include "search/problem/problem_graph.h"

namespace pipeweaver::search {

// Idle time at one end of a rank's order, which holds where some of its F (at
// the end: some of its B) count for less than their lengths.
struct RankEnd {
  uint64_t idle_ns = 0;
  // [pair of the rank]: the most that its F or B counts for; empty: all count.
  std::vector<uint64_t> most_ns;
};

// For one rank with memory M. A pair with choice c holds its activations while
// its F runs and from there to the start of its B, for at least the longest
// path between the two; and other bytes while B runs (split: while I and while
// W run). In bytes times time that is at least held_c. At no time are more than
// M bytes held so: while a stage runs, they are among those that count for it,
// and while none does, among those that counted for the one before. None are
// held in the rank's `head`, before its first F, nor in its `tail`. So
//     makespan >= head + tail + (sum of held_c) / M                         (1)
// By FlowLowerBound's claim, with W in full,
//     makespan >= start + end + (sum of time_c)                             (2)
// where start and end are the ways of its X, and time_c what c takes, F and B
// of those in A counting for no more than their least on the way. It holds for
// all choices alike. So for 0 <= k <= 1 the makespan is at least
//     (1 - k) (start + end) + k (head + tail)
//         + sum over pairs of the least over c of (1 - k) time_c + k held_c / M
// which is a concave function of k, so that its greatest value is soon found.
class MemoryBound {
 public:
  // O(edges).
  MemoryBound(const ProblemGraph& graph, const PathBound& path);

  // False where no choices hold so much that this could say more than
  // `known_ns`, or where to find out would take too long.
  bool Matters(int rank, uint64_t known_ns) const;

  // With ends that hold at once. REQUIRES: Matters(rank, ...).
  uint64_t Compute(int rank, const RankEnd& start, const RankEnd& end) const;

 private:
  struct Way {
    uint64_t forward = 0, backward = 0, weight_grad = 0;
    uint64_t held = 0;  // in bytes times time, by M
  };

  // Calls `add` with every way to run the pair.
  template <typename Add>
  void ForEachWay(int pair, Add add) const;

  const ProblemGraph& graph_;
  const PathBound& path_;
  std::vector<uint64_t> chain_ns_;  // [pair]: ChainsOf
  std::vector<std::vector<int32_t>> pairs_on_rank_;
  bool few_choices_ = false;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_MEMORY_BOUND_H_
