#include "search/strategy/first_of_least.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace pipeweaver::search {
namespace {

TEST(FirstOfLeastTest, IsThatOfMinElement) {
  std::mt19937 random(1);
  for (int count = 1; count <= 20; ++count) {
    for (int round = 0; round < 200; ++round) {
      std::vector<int64_t> numbers(count);
      // Few values, so that the least is often there several times.
      for (int64_t& number : numbers) {
        number = static_cast<int64_t>(random() % 4) - 1;
      }
      EXPECT_EQ(
          FirstOfLeast(numbers),
          std::min_element(numbers.begin(), numbers.end()) - numbers.begin());
    }
  }
}

}  // namespace
}  // namespace pipeweaver::search
