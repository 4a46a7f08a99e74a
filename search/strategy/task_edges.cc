// Dependencies between tasks; see task_edges.h.

#include "search/strategy/task_edges.h"

#include <cstdint>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {
namespace {

// Calls visit(before, after, delay) for every dependency between tasks.
template <typename Visitor>
void ForEachDependency(const ProblemGraph& graph, const Visitor& visit) {
  for (int p = 0; p < graph.pairs; ++p) {
    for (const GraphEdge& edge : graph.producers_of(p)) {
      visit(3 * edge.pair + kForwardTask, 3 * p + kForwardTask, edge.delay_ns);
      if (graph.has_backward(edge.pair)) {
        visit(3 * p + kGradientTask, 3 * edge.pair + kGradientTask,
              edge.delay_ns);
      }
    }
    if (graph.has_backward(p)) {
      visit(3 * p + kForwardTask, 3 * p + kGradientTask, 0);
    }
    if (graph.mode[p] == PairMode::kSplit) {
      visit(3 * p + kGradientTask, 3 * p + kWeightTask, 0);
    }
  }
}

}  // namespace

TaskEdges::TaskEdges(const ProblemGraph& graph) {
  const int tasks = 3 * graph.pairs;
  before_begin_.assign(tasks + 1, 0);
  after_begin_.assign(tasks + 1, 0);
  ForEachDependency(graph, [this](Task from, Task to, int64_t) {
    ++after_begin_[from + 1];
    ++before_begin_[to + 1];
  });
  for (int t = 0; t < tasks; ++t) {
    before_begin_[t + 1] += before_begin_[t];
    after_begin_[t + 1] += after_begin_[t];
  }
  before_.resize(before_begin_[tasks]);
  after_.resize(after_begin_[tasks]);
  std::vector<int32_t> before_fill(before_begin_), after_fill(after_begin_);
  ForEachDependency(graph, [&](Task from, Task to, int64_t delay_ns) {
    before_[before_fill[to]++] = {from, delay_ns};
    after_[after_fill[from]++] = {to, delay_ns};
  });
}

}  // namespace pipeweaver::search
