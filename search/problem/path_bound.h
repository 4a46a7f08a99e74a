// What all lower bounds begin with: least lengths of stages, longest paths, and
// the bound of the problem format. All times in ns; as such, they may need all
// 64 bits (timing.h).

#ifndef SEARCH_PROBLEM_PATH_BOUND_H_
#define SEARCH_PROBLEM_PATH_BOUND_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "search/problem/problem_graph.h"

namespace pipeweaver::search {

// The least lengths of a pair's stages over its choices, each by itself.
struct LeastLengths {
  uint64_t forward = std::numeric_limits<uint64_t>::max();
  uint64_t gradient = std::numeric_limits<uint64_t>::max();  // I or B
  uint64_t weight_grad = std::numeric_limits<uint64_t>::max();
  uint64_t work = std::numeric_limits<uint64_t>::max();  // of one choice
};

// LowerBound (bound.h) and what it is made of.
struct PathBound {
  // Of ranks without work: no head or tail.
  static constexpr uint64_t kUnset = std::numeric_limits<uint64_t>::max();

  uint64_t bound = 0;
  std::vector<LeastLengths> least;  // [pair]
  // The least start and the least remainder of any stage, and the least work.
  std::vector<uint64_t> head, tail, work;  // [rank]
};

// O(edges).
PathBound ComputePathBound(const ProblemGraph& graph);

// [pair]: the longest path from the start of F to the end of I or B, transfers
// included, at the least lengths. O(edges).
std::vector<uint64_t> ChainsOf(const ProblemGraph& graph,
                               const PathBound& path);

// [pair]: the same number where the ranks that the sweep comes over are the
// same.
std::vector<int32_t> RoutesOf(const ProblemGraph& graph);

// The transfer between stage `pair` and the next of its sweep; 0 without one.
uint64_t TransferAfter(const ProblemGraph& graph, int pair);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_PATH_BOUND_H_
