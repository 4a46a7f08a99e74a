// Disjoint sets of numbers (union-find).

#ifndef SEARCH_PROBLEM_DISJOINT_SETS_H_
#define SEARCH_PROBLEM_DISJOINT_SETS_H_

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace pipeweaver::search {

class DisjointSets {
 public:
  // Each of 0 .. count-1 by itself.
  explicit DisjointSets(int count) : parent_(count) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }

  // The least number of the set that `i` is in.
  int32_t Find(int32_t i) {
    while (parent_[i] != i) i = parent_[i] = parent_[parent_[i]];
    return i;
  }

  void Join(int32_t a, int32_t b) {
    a = Find(a);
    b = Find(b);
    parent_[std::max(a, b)] = std::min(a, b);
  }

 private:
  std::vector<int32_t> parent_;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_DISJOINT_SETS_H_
