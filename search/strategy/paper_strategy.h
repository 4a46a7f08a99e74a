// The search of the PipeWeaver paper (arXiv 2504.14145), to compare against:
// Monte Carlo tree search over the order of sweeps, a dual queue per rank that
// alternates forwards and backwards, memory choices per rank afterwards.

#ifndef SEARCH_STRATEGY_PAPER_STRATEGY_H_
#define SEARCH_STRATEGY_PAPER_STRATEGY_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "search/problem/problem.h"
#include "search/strategy/strategy.h"

namespace pipeweaver::search {

// As in the paper: the i-th sweep of a sequence has priority n - i; a node's
// score is the best makespan seen below it, relative to the first one; a child
// is selected by score^alpha + beta * sqrt(ln N_parent / N_child); one node is
// expanded and about 10 random completions are tried. Sweeps of one group keep
// their order, which prunes the tree. Stages enter at their leanest choice, the
// rank that can start first alternates F and B; then each rank's choices are
// improved greedily along its order. Filled in where the paper leaves it open:
// backwards are split into I and W, W in the gaps; admission by the banker's
// rule of list_scheduler.h; the order is timed again after the choice. One
// thread. Errors: as every strategy.
class PaperStrategy : public Strategy {
 public:
  absl::string_view name() const override { return "paper"; }
  absl::StatusOr<SearchResult> Solve(
      const ProblemGraph& graph, const SearchOptions& options) const override;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_PAPER_STRATEGY_H_
