// When the stages of an order start, as early and as late as can be: what list
// scheduling takes as priorities to build an order anew.

#ifndef SEARCH_STRATEGY_ORDER_TIMES_H_
#define SEARCH_STRATEGY_ORDER_TIMES_H_

#include <cstdint>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/task_edges.h"

namespace pipeweaver::search {

// One thread's workspace. Not thread-safe. REQUIRES: orders are complete. Times
// are in ns from the start of the order; a W that is fused away has its B's,
// other tasks that are not in the order 0.
class OrderTimes {
 public:
  // `graph` must outlive it.
  explicit OrderTimes(const ProblemGraph& graph);

  // Start times, [task], each as early as the order allows.
  void Earliest(const TaskOrder& order, std::vector<int64_t>& starts);

  // Start times, [task], when all is scheduled anew in reversed time, what ends
  // last in `order` first (forward-backward improvement: Li and Willis 1992).
  // In reversed time a backward takes its pair's activations and F gives them
  // back; where all that is ready waits for memory, the most urgent goes on
  // over the limit: these are priorities, not a schedule.
  void Latest(const TaskOrder& order, std::vector<int64_t>& starts);

  // How long pairs hold their activations in the order asked about last,
  // [pair]: from the start of F to the end of I or B. 0 without a backward.
  // REQUIRES: one was.
  void Holds(std::vector<int64_t>& hold_ns) const;

 private:
  // Places on a rank: small numbers, of which the greatest is found at once.
  class PlaceSet {
   public:
    // Empties it, for places below `end`.
    void Reset(int end);
    bool empty() const { return count_ == 0; }
    void Insert(int place);
    // REQUIRES: not empty.
    int Last() const;
    int TakeLast();

   private:
    std::vector<uint64_t> words_;    // bits: places
    std::vector<uint64_t> summary_;  // bits: words that are not 0
    int count_ = 0;
  };
  // All that is asked of a task at once stands together.
  struct TaskState {
    int64_t length_ns = 0;
    // In reversed time.
    int64_t may_run_ns = 0;
    int32_t waits = 0;  // tasks that wait for it

    int32_t rank = 0;
    int32_t place = 0;        // on its rank
    int32_t first_waits = 0;  // where no backward is fused
  };
  struct Arrival {
    int64_t at_ns;
    Task task;
  };
  struct Rank {
    std::vector<Task> tasks;  // in the order, as they end: urgent ones are last
    std::vector<Arrival> waiting;  // heap by the time from which they may run
    PlaceSet ready;
    PlaceSet held;  // backwards that memory did not admit
    int64_t free_ns = 0, live_bytes = 0;
  };
  struct Later;

  void SetWays(const Ways& ways);
  void TimeOrder(const TaskOrder& order);
  void GiveFusedTheirs(const Ways& ways, std::vector<int64_t>& starts) const;
  int64_t BytesOf(Task task) const { return bytes_[TaskPair(task)]; }
  // Whether a B runs in I and W's place.
  bool IsFused(const Ways& ways, int pair) const {
    return graph_.mode[pair] == PairMode::kSplit &&
           ways.fused[pair] == Ways::kFused;
  }
  void Arrive(Task task);
  void Admit(int r);
  void UpdateNextStart(int r);
  Task TakeHeld();
  Task TakeReady(int r, int64_t at_ns);

  const ProblemGraph& graph_;
  const TaskEdges edges_;
  std::vector<TaskState> tasks_;
  std::vector<int64_t> end_ns_;  // [task]
  std::vector<int64_t> bytes_;   // [pair]: of its activations
  std::vector<Rank> ranks_;
  std::vector<int64_t> next_start_ns_;  // [rank]: in reversed time
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_ORDER_TIMES_H_
