// The strategy that serves requests. Coarse to fine:
//
//  1. A first valid schedule at once: the plain list rule.
//  2. Rules (pipeline_rule.h): orders of groups, closed forms and memory prices
//     are tried, then varied one number at a time, then at random (simulated
//     annealing) and scheduled a second time by what the first schedule tells;
//     where all backwards are whole, in both directions of time
//     (reversed_time.h).
//  3. The best few schedules found are improved side by side, one by moves on
//     its critical path (order_search.h), the others by building schedules anew
//     from shifted start times (rebuild_search.h); the worst give way to copies
//     of the best. Which these few are, short walks from more of them show. A
//     tiny problem's are annealed, too.
//
// Anytime: returns the best so far when the budget ends, at once when
// cancelled, early at the lower bound. Deterministic: parallel work is batches
// of numbered jobs that start from the same frozen state and are taken over in
// their order, or turns of walks that know nothing of each other, numbered
// likewise. What threads tell each other meanwhile (which rules are too long)
// only saves work of known result. Under an evaluation budget alone, the size
// of every batch depends on problem and budget only.

#ifndef SEARCH_STRATEGY_PORTFOLIO_H_
#define SEARCH_STRATEGY_PORTFOLIO_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "search/problem/problem.h"
#include "search/strategy/strategy.h"

namespace pipeweaver::search {

class PortfolioStrategy : public Strategy {
 public:
  absl::string_view name() const override { return "portfolio"; }
  absl::StatusOr<SearchResult> Solve(
      const ProblemGraph& graph, const SearchOptions& options) const override;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_PORTFOLIO_H_
