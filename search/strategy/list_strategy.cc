// Plain list scheduling; see list_strategy.h.

#include "search/strategy/list_strategy.h"

#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "search/problem/problem.h"
#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/memory_ways.h"
#include "search/strategy/safe_plan.h"
#include "search/strategy/strategy.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

constexpr int kPrices = 4;

}  // namespace

absl::StatusOr<SearchResult> ListStrategy::Solve(
    const ProblemGraph& graph, const SearchOptions& options) const {
  PW_ASSIGN_OR_RETURN(const SafePlan plan, FindSafePlan(graph, options.budget));
  const ListModel model(graph, plan);
  ListScheduler scheduler(model);
  ListRule rule;
  rule.key.resize(3 * graph.pairs);
  for (int p = 0; p < graph.pairs; ++p) {
    rule.key[3 * p + kGradientTask] = graph.pair_sweep[p];
    rule.key[3 * p + kForwardTask] = graph.sweeps + graph.pair_sweep[p];
    rule.key[3 * p + kWeightTask] = 2 * graph.sweeps + graph.pair_sweep[p];
  }
  TaskOrder best, order;
  SearchResult result;
  const std::vector<double> weights = HoldWeights(graph);
  const MemoryPrices memory(graph);
  for (const double price : memory.Typical(weights, kPrices)) {
    scheduler.Run(rule, memory.AllAt(weights, price), order);
    if (result.evaluations++ == 0 || order.makespan_ns < best.makespan_ns) {
      std::swap(best, order);
    }
    if ((options.budget.evaluations > 0 &&
         result.evaluations >= options.budget.evaluations) ||
        options.budget.Stopped()) {
      break;
    }
  }
  result.schedule = ToSchedule(graph, best);
  result.makespan_ns = best.makespan_ns;
  return result;
}

}  // namespace pipeweaver::search
