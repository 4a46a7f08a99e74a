// Two dynamic programs: the least largest sum, then the evenest cut that has
// it.

#include "search/partition/layer_partition.h"

#include <algorithm>
#include <limits>

#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

// Least largest sum, by halving: greedy filling tells whether a limit will do.
int64_t LeastLargest(absl::Span<const int64_t> weights, int chunks) {
  int64_t low = 0;
  int64_t high = 0;
  for (int64_t w : weights) {
    low = std::max(low, w);
    high += w;
  }
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    int used = 1;
    int64_t sum = 0;
    for (int64_t w : weights) {
      if (sum + w > middle) {
        ++used;
        sum = 0;
      }
      sum += w;
    }
    if (used <= chunks) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

}  // namespace

std::vector<int> PartitionLayers(absl::Span<const int64_t> weights,
                                 int chunks) {
  PW_CHECK(chunks >= 1);
  const int n = static_cast<int>(weights.size());
  const int64_t largest = LeastLargest(weights, chunks);
  std::vector<int64_t> prefix(n + 1, 0);
  for (int i = 0; i < n; ++i) prefix[i + 1] = prefix[i] + weights[i];

  // best[c][i]: least sum of squares of layers i.. in chunks c.. .
  std::vector<std::vector<double>> best(chunks + 1,
                                        std::vector<double>(n + 1, kNever));
  std::vector<std::vector<int>> end(chunks, std::vector<int>(n + 1, 0));
  best[chunks][n] = 0;
  for (int c = chunks - 1; c >= 0; --c) {
    for (int i = n; i >= 0; --i) {
      for (int j = i; j <= n && prefix[j] - prefix[i] <= largest; ++j) {
        const double sum = static_cast<double>(prefix[j] - prefix[i]);
        const double squares = sum * sum + best[c + 1][j];
        if (squares <= best[c][i] && squares < kNever) {
          best[c][i] = squares;
          end[c][i] = j;
        }
      }
    }
  }
  std::vector<int> lengths;
  int i = 0;
  for (int c = 0; c < chunks; ++c) {
    lengths.push_back(end[c][i] - i);
    i = end[c][i];
  }
  PW_CHECK(i == n);
  return lengths;
}

}  // namespace pipeweaver::search
