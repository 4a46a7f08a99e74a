// A problem read from its end. Run backwards in time, a schedule is one of a
// problem of the same shape in which backwards and forwards have changed
// places. List scheduling packs well what it places first and leaves gaps
// towards the end, where chains with long stages last leave the longest; from
// the other end of time they end with their short ones (bidirectional planning:
// Klein 2000).

#ifndef SEARCH_STRATEGY_REVERSED_TIME_H_
#define SEARCH_STRATEGY_REVERSED_TIME_H_

#include <optional>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"

namespace pipeweaver::search {

// The problem of `graph` in reversed time: the same pairs, edges and choices,
// F as long as B was and B as long as F.
//
// Memory: while a pair is held it counts its activations, as before; but what B
// needs beyond them now comes with the pair's first task, which list scheduling
// does not know. So each rank's limit is less by a headroom for the one B that
// runs, and a choice that needs more than that counts the rest for as long as
// it is held. Every order that fits there fits in its own time, not the other
// way round.
//
// None where a pair has no backward or may split it (I and W in reversed time
// are no such problem).
std::optional<ProblemGraph> InReversedTime(const ProblemGraph& graph);

// An order of the problem in reversed time as one of the problem itself, or the
// other way round. The makespan stays: the longest path is the same.
void ReverseTime(TaskOrder& order);

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_REVERSED_TIME_H_
