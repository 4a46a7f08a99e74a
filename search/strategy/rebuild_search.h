// Local search by rebuilding (iterated local search): the start times of an
// order, those of a group or two shifted, are the priorities by which the list
// scheduler builds the next order, that one's latest start times those by which
// it is built once more, forwards held back to about the latest start times in
// both; where it is about as good as the first, descent on its critical path
// improves it. Reaches what single moves do not: a group's stages
// change places with others' on all ranks at once.

#ifndef SEARCH_STRATEGY_REBUILD_SEARCH_H_
#define SEARCH_STRATEGY_REBUILD_SEARCH_H_

#include <cstdint>
#include <functional>
#include <random>
#include <vector>

#include "search/strategy/list_scheduler.h"
#include "search/strategy/order_search.h"
#include "search/strategy/order_times.h"
#include "search/strategy/pipeline_rule.h"

namespace pipeweaver::search {

// One thread's workspace. Not thread-safe.
class RebuildSearch {
 public:
  // All must outlive it.
  RebuildSearch(const ListModel& model, const PipelineRules& rules);

  // Takes over `order`, which must be complete and within memory. `stop`: as in
  // WalkOptions.
  void Load(const TaskOrder& order,
            const std::function<bool()>* stop = nullptr);

  // What one rebuild may take of WalkOptions::moves: two schedules and a
  // descent.
  static constexpr int64_t kMovesPerSchedule = 128;
  static constexpr int64_t kMovesPerDescent = 512;
  static constexpr int64_t kMovesPerRebuild =
      2 * kMovesPerSchedule + kMovesPerDescent;

  // Walks on from the order as it stands, and writes it to `best`, a schedule,
  // whenever it is better. Asks options.stop before each rebuild, and as often
  // as OrderSearch within. Returns the proposals made, a schedule counted as
  // kMovesPerSchedule: at most those asked for, less where they are too few for
  // one more rebuild.
  int64_t Walk(const WalkOptions& options, ListScheduler& scheduler,
               TaskOrder& best);

 private:
  // What of a group is shifted.
  enum class Part : uint8_t { kAll, kForwards, kBackwards, kFromThenOn };

  void Adopt();
  void ShiftGroup();
  double Random() {
    return static_cast<double>(random_() >> 11) * 0x1p-53;  // [0, 1)
  }
  int RandomBelow(int bound) {
    return static_cast<int>(random_() % static_cast<uint64_t>(bound));
  }

  const PipelineRules& rules_;
  std::vector<std::vector<int32_t>> pairs_of_group_;
  OrderSearch orders_;
  OrderTimes times_;
  TaskOrder current_, next_, again_;
  std::vector<int64_t> earliest_ns_, latest_ns_;  // of current_, [task]
  ListRule list_;
  std::mt19937_64 random_;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_REBUILD_SEARCH_H_
