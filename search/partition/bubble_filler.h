// Places stages in the bubbles of a static order, as Optimus does with those of
// encoders (Feng et al., arXiv 2408.03505).

#ifndef SEARCH_PARTITION_BUBBLE_FILLER_H_
#define SEARCH_PARTITION_BUBBLE_FILLER_H_

#include <optional>
#include <vector>

#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

struct BubbleRule {
  // Most microbatches that have begun with their fillers and not ended; fewer
  // hold less memory.
  int most_begun = 0;
  // Where both are ready, backwards of fillers come before forwards.
  bool backward_first = false;
  // A filler does not start when the order's next stage is known to be ready
  // before it would end.
  bool waits = false;
};

// Adds all stages of `problem` that are not in `order` (the fillers) to it:
// every rank runs its order as it stands, and a filler whenever the order's
// next stage is not ready; fillers by microbatch. None if the order waits for
// fillers that `most_begun` does not let begin.
//
// REQUIRES: whole backwards, one choice a stage, sweeps in `order` entirely or
// not at all.
std::optional<Schedule> FillBubbles(const Problem& problem,
                                    const ProblemGraph& graph,
                                    const Schedule& order,
                                    const BubbleRule& rule);

}  // namespace pipeweaver::search

#endif  // SEARCH_PARTITION_BUBBLE_FILLER_H_
