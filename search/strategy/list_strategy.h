// Plain list scheduling: backwards first, then forwards in the order of sweeps,
// weight gradients in the gaps; the best of a few uniform memory choices.
// Always finds a schedule where one is known to exist.

#ifndef SEARCH_STRATEGY_LIST_STRATEGY_H_
#define SEARCH_STRATEGY_LIST_STRATEGY_H_

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "search/problem/problem.h"
#include "search/strategy/strategy.h"

namespace pipeweaver::search {

class ListStrategy : public Strategy {
 public:
  absl::string_view name() const override { return "list"; }
  absl::StatusOr<SearchResult> Solve(
      const ProblemGraph& graph, const SearchOptions& options) const override;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_LIST_STRATEGY_H_
