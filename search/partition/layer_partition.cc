// Two dynamic programs: the least largest sum, then the evenest cut that has
// it.

#include "search/partition/layer_partition.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();

constexpr int kMostEvenedOut = 512;

// Fills chunk after chunk up to both limits; none if `chunks` are not enough.
std::optional<std::vector<int>> Fill(absl::Span<const int64_t> weights,
                                     int chunks, int64_t most_weight,
                                     absl::Span<const int64_t> sizes,
                                     int64_t most_size) {
  std::vector<int> lengths = {0};
  int64_t weight = 0;
  int64_t size = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i] > most_weight || sizes[i] > most_size) return std::nullopt;
    if (weight + weights[i] > most_weight || size + sizes[i] > most_size) {
      lengths.push_back(0);
      weight = size = 0;
    }
    weight += weights[i];
    size += sizes[i];
    ++lengths.back();
  }
  if (static_cast<int>(lengths.size()) > chunks) return std::nullopt;
  lengths.resize(chunks, 0);
  return lengths;
}

}  // namespace

std::vector<int> PartitionLayers(absl::Span<const int64_t> weights,
                                 int chunks) {
  const std::vector<int64_t> no_sizes(weights.size(), 0);
  std::optional<std::vector<int>> lengths =
      PartitionLayersWithin(weights, chunks, no_sizes, 0);
  // One chunk can take everything.
  PW_CHECK(lengths.has_value());
  return *std::move(lengths);
}

std::optional<std::vector<int>> PartitionLayersWithin(
    absl::Span<const int64_t> weights, int chunks,
    absl::Span<const int64_t> sizes, int64_t most_size) {
  PW_CHECK(chunks >= 1);
  PW_CHECK(sizes.size() == weights.size());
  const int n = static_cast<int>(weights.size());
  std::vector<int64_t> weight_before(n + 1, 0);
  std::vector<int64_t> size_before(n + 1, 0);
  for (int i = 0; i < n; ++i) {
    weight_before[i + 1] = weight_before[i] + weights[i];
    size_before[i + 1] = size_before[i] + sizes[i];
  }

  // The least largest sum, by halving.
  int64_t low = 0;
  int64_t high = weight_before[n];
  if (!Fill(weights, chunks, high, sizes, most_size)) return std::nullopt;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (Fill(weights, chunks, middle, sizes, most_size)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  if (n > kMostEvenedOut || chunks > kMostEvenedOut) {
    return Fill(weights, chunks, high, sizes, most_size);
  }

  // best[c][i]: least sum of squares of layers i.. in chunks c.. .
  std::vector<std::vector<double>> best(chunks + 1,
                                        std::vector<double>(n + 1, kNever));
  std::vector<std::vector<int>> end(chunks, std::vector<int>(n + 1, 0));
  best[chunks][n] = 0;
  for (int c = chunks - 1; c >= 0; --c) {
    for (int i = n; i >= 0; --i) {
      for (int j = i; j <= n; ++j) {
        if (weight_before[j] - weight_before[i] > high ||
            size_before[j] - size_before[i] > most_size) {
          break;
        }
        const double sum =
            static_cast<double>(weight_before[j] - weight_before[i]);
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
