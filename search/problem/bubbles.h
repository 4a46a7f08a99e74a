// Why ranks stand idle in a schedule.

#ifndef SEARCH_PROBLEM_BUBBLES_H_
#define SEARCH_PROBLEM_BUBBLES_H_

#include <cstdint>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

// A rank's idle time up to the makespan by cause; the four add up to it.
struct Bubbles {
  // The rank has less work than the busiest one, and would stand idle for so
  // long in any order.
  int64_t imbalance_ns = 0;
  // The next stage's inputs were still being computed, and no other forward was
  // there to run.
  int64_t dependency_ns = 0;
  // A forward had its inputs, but no memory.
  int64_t memory_ns = 0;
  // The next stage's last input was on its way.
  int64_t transfer_ns = 0;

  int64_t total_ns() const {
    return imbalance_ns + dependency_ns + memory_ns + transfer_ns;
  }
};

// One entry a rank. Idle time before a stage is transfer from the end of its
// last input's stage on; before that it is memory where some forward of the
// rank had all inputs at its begin and did not fit beside what was live, else
// dependency; idle time at the end is dependency. Imbalance then takes the
// place of dependency, as far as the rank has less work than the busiest one.
// REQUIRES: `times` are those of `schedule` (TimeSchedule), below 2^62.
// O(stages^2 / ranks) at worst.
std::vector<Bubbles> AttributeBubbles(const ProblemGraph& graph,
                                      const Schedule& schedule,
                                      const StageTimes& times);

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_BUBBLES_H_
