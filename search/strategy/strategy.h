// The one interface behind which every way to schedule a problem stands:
// baselines, list scheduling, the paper's tree search, local search, and the
// portfolio that serves requests.

#ifndef SEARCH_STRATEGY_STRATEGY_H_
#define SEARCH_STRATEGY_STRATEGY_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"

namespace pipeweaver::search {

class WorkerPool;

// When a search ends. It also ends when its makespan meets the lower bound.
struct SearchBudget {
  // Most schedules evaluated; 0: no such limit. With this limit alone the
  // result depends on problem, seed and warm start only, never on threads.
  int64_t evaluations = 0;
  // Time at which the best schedule so far is returned; none: no such limit.
  std::optional<std::chrono::steady_clock::time_point> deadline;
  // Set by another thread to end the search at once; may be null. Not owned.
  const std::atomic<bool>* cancelled = nullptr;

  // Cancelled, or past the deadline.
  bool Stopped() const {
    if (cancelled != nullptr && cancelled->load(std::memory_order_relaxed)) {
      return true;
    }
    return deadline.has_value() &&
           std::chrono::steady_clock::now() >= *deadline;
  }
};

struct SearchOptions {
  SearchBudget budget;
  uint64_t seed = 1;
  int threads = 1;  // >= 1
  // Whose threads search, where the caller has more work for them; null: the
  // search starts `threads` of its own. Not owned.
  WorkerPool* pool = nullptr;
  // A schedule to start from; may be null. Of this very problem, nothing worse
  // is returned; of one like it, the order of its sweeps is tried. Not owned.
  const Schedule* warm_start = nullptr;
  // SearchResult::settings of a problem like this one, to start from; may be
  // empty. Any numbers are taken; what makes no sense is ignored.
  std::vector<int32_t> warm_settings;
  // LowerBound of the problem (search/problem/bound.h), where it is known.
  std::optional<int64_t> lower_bound_ns;
};

struct SearchResult {
  Schedule schedule;
  int64_t makespan_ns = 0;
  int64_t evaluations = 0;
  // What worked best, in numbers that mean something to the strategy only;
  // empty where it has nothing to tell.
  std::vector<int32_t> settings;
};

class Strategy {
 public:
  virtual ~Strategy() = default;

  // The name that commands, requests and reports use, such as "1f1b".
  virtual absl::string_view name() const = 0;

  // Schedules the problem of `graph`. Every
  // returned schedule is complete, deadlock-free and within memory.
  //
  // Errors: RESOURCE_EXHAUSTED when no schedule fits: the message names rank,
  // bytes and limit and says whether none exists or none was found;
  // FAILED_PRECONDITION when this strategy does not apply to such a problem.
  //
  // Thread-safe: strategies hold no state between calls.
  virtual absl::StatusOr<SearchResult> Solve(
      const ProblemGraph& graph, const SearchOptions& options) const = 0;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_STRATEGY_H_
