// The exhaustive oracle: the least makespan of a small problem by trying every
// order and every choice. Shares nothing with the strategies but the graph.

#ifndef SEARCH_STRATEGY_TESTING_ORACLE_H_
#define SEARCH_STRATEGY_TESTING_ORACLE_H_

#include <cstdint>
#include <optional>

#include "search/problem/problem_graph.h"

namespace pipeweaver::search {

struct OracleAnswer {
  // The least makespan; none when no schedule fits.
  std::optional<int64_t> makespan_ns;
  // False when the search gave up at `most_steps`; then makespan_ns is the best
  // it saw.
  bool exact = true;
};

// Branch and bound over all orders in which tasks can be started one after
// another (every schedule is one of them), with a memory of states. Exponential
// in tasks: for up to about 5 pairs.
OracleAnswer SolveExhaustively(const ProblemGraph& graph,
                               int64_t most_steps = 2'000'000);

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_TESTING_ORACLE_H_
