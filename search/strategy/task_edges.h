// Which tasks wait for which, flattened into arrays: what passes over whole
// orders go along, many times for one problem.

#ifndef SEARCH_STRATEGY_TASK_EDGES_H_
#define SEARCH_STRATEGY_TASK_EDGES_H_

#include <cstdint>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {

// The other task, and the transfer between the two ranks (0 on one rank).
struct TaskEdge {
  Task task;
  int64_t delay_ns;
};

// The dependencies of a problem, but the order on each rank. Those of a W are
// there for every pair of kSplit, fused or not. Immutable; thread-safe.
class TaskEdges {
 public:
  explicit TaskEdges(const ProblemGraph& graph);

  // What `task` waits for.
  ArrayView<TaskEdge> before(Task task) const {
    return {before_.data() + before_begin_[task],
            before_.data() + before_begin_[task + 1]};
  }
  // What waits for `task`.
  ArrayView<TaskEdge> after(Task task) const {
    return {after_.data() + after_begin_[task],
            after_.data() + after_begin_[task + 1]};
  }

 private:
  std::vector<int32_t> before_begin_, after_begin_;  // [task], and the totals
  std::vector<TaskEdge> before_, after_;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_TASK_EDGES_H_
