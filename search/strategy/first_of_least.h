// The first of the least numbers: which rank goes on next, asked for every
// stage of every schedule.

#ifndef SEARCH_STRATEGY_FIRST_OF_LEAST_H_
#define SEARCH_STRATEGY_FIRST_OF_LEAST_H_

#include <cstddef>
#include <cstdint>

#include "absl/types/span.h"

namespace pipeweaver::search {

// The place of the least number, of several the first. Looks through both
// halves at once and without branches on the numbers, which no processor
// predicts. REQUIRES: there is one.
inline int FirstOfLeast(absl::Span<const int64_t> numbers) {
  const size_t half = numbers.size() / 2;
  size_t low = 0, high = half;
  int64_t low_number = numbers[0], high_number = numbers[half];
  const auto look = [&numbers](size_t at, size_t& least, int64_t& number) {
    const bool less = numbers[at] < number;
    number = less ? numbers[at] : number;
    least = less ? at : least;
  };
  for (size_t i = 1; i < half; ++i) {
    look(i, low, low_number);
    look(half + i, high, high_number);
  }
  // With an odd count, the upper half has one more.
  look(numbers.size() - 1, high, high_number);
  return static_cast<int>(high_number < low_number ? high : low);
}

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_FIRST_OF_LEAST_H_
