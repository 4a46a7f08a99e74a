// A scheduling problem flattened into arrays, the form that search, timing and
// bounds work on: stage pairs are numbered sweep by sweep, the dependencies of
// sections "Order" and "Transfers" are edges between pairs.

#ifndef SEARCH_PROBLEM_PROBLEM_GRAPH_H_
#define SEARCH_PROBLEM_PROBLEM_GRAPH_H_

#include <cstdint>
#include <vector>

#include "search/problem/problem.h"

namespace pipeweaver::search {

// How a stage pair's backward runs.
enum class PairMode : uint8_t {
  kForwardOnly,  // F
  kWhole,        // F, B
  kSplit,  // F, I, W; or F, B where the picked choice has a fused backward
};

struct GraphChoice {
  int64_t forward_ns = 0;
  // kSplit only.
  int64_t input_grad_ns = 0;
  int64_t weight_grad_ns = 0;
  // Length of B: of the whole backward (kWhole), of the fused one (kSplit), or
  // kNone where the choice has none.
  int64_t backward_ns = 0;
  int64_t activation_bytes = 0;
  // Held while B runs (kWhole: backward_bytes, kSplit: fused_backward_bytes).
  int64_t backward_bytes = 0;
  // kSplit only: held while I runs, and from I's end to W's.
  int64_t input_grad_bytes = 0;
  int64_t weight_grad_bytes = 0;

  static constexpr int64_t kNone = -1;
  bool has_backward() const { return backward_ns != kNone; }
};

// An edge: the other pair, and the transfer between the two ranks (0 on one
// rank). The gradient takes the same edge back in the same time.
struct GraphEdge {
  int32_t pair = 0;
  int64_t delay_ns = 0;
};

// A view of consecutive elements of an array.
template <typename T>
struct ArrayView {
  const T* first;
  const T* last;
  const T* begin() const { return first; }
  const T* end() const { return last; }
  int size() const { return static_cast<int>(last - first); }
  const T& operator[](int i) const { return first[i]; }
};

// Immutable once made; safe to share between threads.
struct ProblemGraph {
  int ranks = 0;
  int sweeps = 0;
  int pairs = 0;

  std::vector<int64_t> limit_bytes;       // [rank]
  std::vector<int32_t> sweep_first_pair;  // [sweep], and `pairs` at the end
  std::vector<int32_t> pair_sweep;        // [pair]
  std::vector<int32_t> pair_rank;         // [pair]
  std::vector<PairMode> mode;             // [pair]
  // Pairs of alike stages share their choices.
  std::vector<int32_t> choice_begin;  // [pair]: in `choices`
  std::vector<int32_t> choice_count;  // [pair]
  std::vector<GraphChoice> choices;
  // Pairs whose F feeds this pair's F, and the other way round. The backward
  // edges are these reversed, where the pair that they lead to has a backward.
  std::vector<int32_t> producer_begin;  // [pair], and the total at the end
  std::vector<GraphEdge> producers;
  std::vector<int32_t> consumer_begin;  // [pair], and the total at the end
  std::vector<GraphEdge> consumers;
  // Pairs so ordered that producers come first.
  std::vector<int32_t> topological;

  int stage_index(int pair) const {
    return pair - sweep_first_pair[pair_sweep[pair]];
  }
  bool has_backward(int pair) const {
    return mode[pair] != PairMode::kForwardOnly;
  }
  ArrayView<GraphChoice> choices_of(int pair) const {
    const GraphChoice* first = choices.data() + choice_begin[pair];
    return {first, first + choice_count[pair]};
  }
  ArrayView<GraphEdge> producers_of(int pair) const {
    return {producers.data() + producer_begin[pair],
            producers.data() + producer_begin[pair + 1]};
  }
  ArrayView<GraphEdge> consumers_of(int pair) const {
    return {consumers.data() + consumer_begin[pair],
            consumers.data() + consumer_begin[pair + 1]};
  }
};

// REQUIRES: `problem` is well formed (ValidateProblem).
ProblemGraph BuildProblemGraph(const Problem& problem);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_PROBLEM_GRAPH_H_
