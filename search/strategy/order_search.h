// Local search on an order: descent, or simulated annealing, over moves on the
// critical path, with the effect of a move known before it is made.
//
// State: each rank's order and one sequence of all tasks that every dependency
// and every rank's order follow. For every task the end time, and the time that
// is left from its start (the longest path to the end of the schedule), so that
// the longest path through tasks that a move touches is a few additions
// (Taillard 1994; Balas and Vazacopoulos 1998). A move is made only when it is
// accepted, and costs one pass over the part of the sequence behind it and one
// over the part before it.
//
// Moves: a task changes places with one near it on its rank; a backward is
// fused or split; a pair changes its choice. Memory is checked along the rank's
// order, so every state is a valid schedule.

#ifndef SEARCH_STRATEGY_ORDER_SEARCH_H_
#define SEARCH_STRATEGY_ORDER_SEARCH_H_

#include <cstdint>
#include <functional>
#include <random>
#include <utility>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/strategy/list_scheduler.h"
#include "search/strategy/task_edges.h"

namespace pipeweaver::search {

// Of a walk of local search, by moves or by rebuilding (rebuild_search.h).
struct WalkOptions {
  int64_t moves = 0;  // proposals
  // How much worse a move may make the makespan, as a share of it: that much
  // with a chance of 1/e. 0: descent.
  double temperature = 0;
  int64_t stop_at_ns = 0;  // the lower bound
  uint64_t seed = 1;
  // Asked now and then; true ends the walk.
  const std::function<bool()>* stop = nullptr;
};

// One thread's workspace. Not thread-safe.
class OrderSearch {
 public:
  explicit OrderSearch(const ProblemGraph& graph);

  // Takes over `order`, which must be complete and within memory.
  void Load(const TaskOrder& order);

  // Walks on from the order as it stands. Whenever that is better than `best`
  // (or `best` is empty) it is written there. Returns the proposals made.
  int64_t Anneal(const WalkOptions& options, TaskOrder& best);

  // Fuses every backward whose slack allows it (I and W into one B), in one
  // pass along the sequence; the makespan does not grow. Returns how many.
  int FuseWhereSlack();

  // Gives pairs faster choices where memory along their rank's order allows,
  // most time per byte first, until `stop`, which may be null, says true.
  // Returns how many.
  int SpeedUpWhereMemoryAllows(const std::function<bool()>* stop = nullptr);

  // The loaded order as it stands now.
  void Save(TaskOrder& to) const;

  int64_t makespan_ns() const { return makespan_ns_; }

 private:
  struct End {
    Task task;
    int64_t ns;
  };
  struct Bytes {
    int64_t peak;   // above what is live before the task
    int64_t after;  // change once it has ended
  };

  bool Exists(Task task) const { return exists_[task] != 0; }
  int64_t StartOf(Task task) const { return end_ns_[task] - length_ns_[task]; }
  int64_t TailOf(Task task) const { return left_ns_[task] - length_ns_[task]; }
  int64_t LengthOf(Task task) const;
  Bytes BytesOf(Task task) const;
  void SetPair(int pair);
  void MarkDirty(Task task);
  void ForwardPass(size_t first_word);
  void BackwardPass(size_t last_word);
  int64_t EndOf(Task task) const;
  int64_t LeftOf(Task task) const;
  std::pair<size_t, size_t> MarkChanged();
  void Refresh();
  void RefreshEnds();
  void RefreshLefts();
  bool RefreshIfAccepted(double temperature);
  void RefreshAll();
  void FindMakespan();
  Task PickCritical();
  void TraceCriticalPath();
  bool MemoryAllowsSwap(Task first, Task second) const;
  Task LastOf(int pair) const;
  bool MemoryAllowsPair(int pair) const;
  void RecountPair(int pair);
  int64_t EstimateSwap(Task first, Task second) const;
  bool Swap(Task first, Task second);
  bool DependsOnMarked(Task task) const;
  bool ProposeSwap(double temperature);
  bool ProposeShift(double temperature);
  bool ProposeFuse(double temperature);
  bool ProposeChoice(double temperature);
  bool ProposeWay(double temperature);
  void ChangeWay(int pair, int choice, bool fused, Task weight_after);
  bool Accept(int64_t estimate_ns, double temperature);
  void Unlink(Task task);
  void LinkAfter(Task task, Task before);
  uint64_t Random() { return random_(); }
  uint32_t RandomBelow(uint32_t bound) {
    return static_cast<uint32_t>(
        (static_cast<uint64_t>(static_cast<uint32_t>(random_())) * bound) >>
        32);
  }
  void RecountMemory();
  // Writes the order down if it is better than what stands in *best_. Called
  // before a change that may make it worse, not at every gain.
  void SaveBest();

  const ProblemGraph& graph_;
  const TaskEdges edges_;
  bool can_fuse_ = false, can_choose_ = false;

  Ways ways_;
  std::vector<Task> sequence_;
  std::vector<int32_t> position_;  // [task]: in sequence_, or -1
  std::vector<uint8_t> exists_;    // [task]: not so for a W that is fused away
  std::vector<Task> rank_prev_, rank_next_;  // [task], or -1
  std::vector<Task> rank_last_;              // [rank], or -1
  std::vector<int64_t> length_ns_, end_ns_, left_ns_, live_before_;  // [task]
  std::vector<uint64_t> dirty_;  // bits: positions whose times are out of date
  // Tasks whose lengths or neighbours changed since times were up to date; may
  // name a task twice, and -1 or a W that is fused away for none.
  std::vector<Task> changed_;
  std::vector<End> replaced_;  // what the last refresh changed, as it was
  int64_t makespan_ns_ = 0;
  std::vector<Task> critical_;   // one critical path, from the end, or empty
  std::vector<uint8_t> marked_;  // [task]
  std::vector<Task> depending_, rest_, window_;
  std::mt19937_64 random_;
  TaskOrder* best_ = nullptr;  // of the walk under way
  bool best_unsaved_ = false;  // the order as it stands is the best
};

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_ORDER_SEARCH_H_
