// Why the ranks of a schedule stand idle.

#ifndef SEARCH_PLAN_BUBBLE_CAUSES_H_
#define SEARCH_PLAN_BUBBLE_CAUSES_H_

#include <cstdint>

#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

// Nanoseconds summed over ranks; together the ranks' whole idle time.
struct BubbleCauses {
  int64_t imbalance_ns = 0;
  int64_t dependency_ns = 0;
  int64_t memory_ns = 0;
  int64_t transfer_ns = 0;
};

// A rank's idle time is the makespan less its busy time. Of that,
// - imbalance: what the busiest rank is busy longer; no order fills it;
// - the rest goes to the other causes in proportion to the rank's gaps. In the
//   gap before a stage, from the moment on at which a forward that stands later
//   in the rank's order had its inputs but no room beside what was live:
//   memory. Before that, while the stage's last input was on its way: transfer;
//   while it was not made yet, and behind the rank's last stage: dependency.
//
// REQUIRES: the schedule passed CheckPlan with these times. Linear.
BubbleCauses FindBubbleCauses(const ProblemGraph& graph,
                              const Schedule& schedule,
                              const StageTimes& times);

}  // namespace pipeweaver::search

#endif  // SEARCH_PLAN_BUBBLE_CAUSES_H_
