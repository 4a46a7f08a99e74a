// List scheduling by keys, the engine under every strategy: at each step the
// rank that can start earliest takes its ready stage with the least key that
// memory admits. Strategies differ only in keys, choices and patience.
//
// Never stuck (banker's rule). Components of sweeps (safe_plan.h) stand in the
// order in which their first F ran. Kept true on every rank, for every
// component j not yet finished:
//
//     sum over k behind j of held(k) + need(j) <= limit,
//
// where held are the activations of F whose backward has not run, and need(j)
// is the most that j holds while it is finished alone in the order of its safe
// plan. So everything begun can be finished in that order, one component after
// another; a component not begun holds nothing and fits alone. The rule breaks
// only through an F (which adds to held), so F are admitted by it. Backwards
// only give back; W never needs more, so bytes between I and W are not part of
// the rule: where they stand in the way, W runs first. The first component's
// next stage is therefore always admitted, on some rank, and the schedule ends.
// A limit on open work (ListRule::open_work_ns) changes none of this: it holds
// a component back only while another is begun and not finished. Nor do times
// before which F may not run: they pass.

#ifndef SEARCH_STRATEGY_LIST_SCHEDULER_H_
#define SEARCH_STRATEGY_LIST_SCHEDULER_H_

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "search/problem/problem_graph.h"
#include "search/problem/schedule.h"
#include "search/strategy/safe_plan.h"

namespace pipeweaver::search {

// A stage as a number: 3 * pair + kForwardTask, kGradientTask (I or B) or
// kWeightTask.
using Task = int32_t;
inline constexpr int kForwardTask = 0;
inline constexpr int kGradientTask = 1;
inline constexpr int kWeightTask = 2;

inline constexpr int TaskKind(Task task) {
  return static_cast<int>(static_cast<uint32_t>(task) % 3);
}
inline constexpr int TaskPair(Task task) {
  return static_cast<int>(static_cast<uint32_t>(task) / 3);
}

// How every pair is run.
struct Ways {
  std::vector<int32_t> choice;  // [pair]
  std::vector<uint8_t> fused;  // [pair]; kFused: B in place of I and W (kSplit)

  static constexpr uint8_t kApart = 0;
  static constexpr uint8_t kFused = 1;
  // For the list scheduler to decide (ListRule::weight_reserve_ns); never in
  // its result.
  static constexpr uint8_t kEither = 2;
};

// A complete schedule in search form.
struct TaskOrder {
  // Every task after those it waits for; each rank's order is the part of it
  // on that rank.
  std::vector<Task> tasks;
  Ways ways;
  int64_t makespan_ns = 0;
};

struct ListRule {
  std::vector<int64_t> key;  // [task]; less runs first, ties by task
  // [pair], or empty: when a rank may take its F, ns; before, it rather waits
  // for something else. What begins late holds its memory for less time.
  // Decides the order only: in the schedule F starts as early as the order
  // allows.
  std::vector<int64_t> not_before_ns;
  // A rank waits for a stage of less key that is about to arrive rather than
  // start one that would delay it, when the wait is at most this share of the
  // other's length, in 1/256.
  int patience = 0;
  // Where forwards and gradients are ready, a rank runs them in turn.
  bool alternate = false;
  // Every rank runs its stages exactly by key, waiting for each, as far as
  // memory and dependencies let it; from where they do not on, by key and
  // readiness as otherwise. Keys on a rank are different small numbers.
  bool strict = false;
  // A backward that may be either is fused when its rank has at least this much
  // of weight gradients waiting: enough to fill the gaps to come.
  int64_t weight_reserve_ns = 0;
  // No component begins while those begun and not finished have at least this
  // much work (ListModel::component_work_ns): the fewer are open, the shorter
  // each holds its memory.
  int64_t open_work_ns = std::numeric_limits<int64_t>::max();
};

// What the engine needs of a problem, computed once. Immutable; thread-safe.
class ListModel {
 public:
  // `graph` and `plan` must outlive the model.
  ListModel(const ProblemGraph& graph, const SafePlan& plan);

  const ProblemGraph& graph() const { return graph_; }
  const SafePlan& plan() const { return plan_; }

  // A cell is a component's part on one rank, of those that it or sweeps
  // without a backward that it waits for stand on.
  int cells() const { return static_cast<int>(cells_.size()); }
  int cell_rank(int cell) const { return cells_[cell].rank; }
  // Of a pair's component on its rank; -1 without a backward.
  int cell_of(int pair) const { return places_[pair].cell; }
  // The most bytes that a cell holds while its component runs alone in the
  // order of its safe plan, its pairs run as `ways` say.
  int64_t NeedAlone(int cell_index, const Ways& ways) const;

  // The length of a component's forwards, each the first choice's.
  int64_t component_work_ns(int component) const {
    return component_work_ns_[component];
  }

 private:
  friend class ListScheduler;

  // Fills frozen_before_; of each sweep without a backward, the last pairs on
  // every rank that it or what it waits for stands on.
  std::vector<std::vector<int32_t>> FindLastFrozen();
  // Adds those of the sweeps that `sweep` is after.
  void AddFrozenProducers(const std::vector<std::vector<int32_t>>& last_frozen,
                          int sweep, std::vector<int32_t>& pairs) const;

  // What every step of a schedule asks of a pair.
  struct Place {
    ArrayView<GraphEdge> producers, consumers;
    int32_t rank = 0;
    int32_t component = -1, cell = -1;  // without a backward -1
    int32_t backward_step = -1;         // in steps_
    PairMode mode = PairMode::kForwardOnly;
    bool is_root = false;         // nothing comes before its F
    bool forwards_first = false;  // of its component

    bool has_backward() const { return mode != PairMode::kForwardOnly; }
  };
  struct Cell {
    int32_t component = 0, rank = 0;
    int32_t steps_begin = 0, steps_end = 0;  // in steps_
    int32_t forwards = 0;
    int32_t frozen = 0;  // in frozen_for_
  };

  const ProblemGraph& graph_;
  const SafePlan& plan_;
  std::vector<Cell> cells_;          // by component, then rank
  std::vector<int32_t> cell_begin_;  // [component], and the total at the end
  std::vector<Place> places_;        // [pair]
  bool all_forwards_first_ = true;   // of all components
  bool all_backward_ = true;         // every pair has one
  // Per cell the steps of its safe plan on that rank: only the backwards where
  // all F come first.
  std::vector<SafeStep> steps_;
  std::vector<int64_t> component_work_ns_;
  std::vector<int32_t> backwards_;  // [component]
  // Per component, the pairs of its first stages.
  std::vector<std::vector<int32_t>> roots_;
  // Per pair without a backward: the cells on its rank that wait for it, and
  // its last producers there, at any distance; those that come before other
  // such ones for certain are left out.
  std::vector<std::vector<int32_t>> frozen_for_;
  std::vector<std::vector<int32_t>> frozen_before_;
  std::vector<std::vector<int32_t>> rank_roots_;  // [rank]: pairs
};

// One thread's workspace. Not thread-safe.
class ListScheduler {
 public:
  explicit ListScheduler(const ListModel& model);

  // Schedules by `rule`, running pairs as `ways` says; where a component's
  // part on a rank would not fit alone that way, its safe ways are taken.
  // The result stands in `order` (its storage is reused). Gives up, leaving
  // `order` without tasks and its makespan the greatest number, as soon as the
  // makespan is sure to be over `worth_ns`.
  void Run(const ListRule& rule, const Ways& ways, TaskOrder& order,
           int64_t worth_ns = std::numeric_limits<int64_t>::max());

 private:
  struct Entry {
    int64_t key;
    int64_t arrival_ns;
    int64_t more_bytes;  // of memory while it runs
    Task task;
    int32_t component;  // whose F it is; -1: of none

    bool operator<(const Entry& other) const {
      return key != other.key ? key < other.key : task < other.task;
    }
  };
  // Entries by key; taken mostly from the front.
  class Queue {
   public:
    // For so many entries until it is cleared, those taken included.
    void Reserve(size_t count) {
      storage_ = std::make_unique<Entry[]>(count);
      Clear();
    }
    Entry* begin() const { return begin_; }
    Entry* end() const { return end_; }
    bool empty() const { return begin_ == end_; }
    void Clear() { begin_ = end_ = storage_.get(); }
    void Insert(const Entry& entry);
    // Appended entries must be sorted in before anything else is asked.
    void Append(const Entry& entry) {
      *end_++ = entry;
      ++appended_;
    }
    void SortAppended();
    Entry Take(Entry* taken);
    // The entry of `task`, or end().
    Entry* Find(Task task) const;

   private:
    std::unique_ptr<Entry[]> storage_;
    Entry* begin_ = nullptr;
    Entry* end_ = nullptr;
    int64_t appended_ = 0;
  };
  struct Rank {
    int64_t work_ns = 0;  // at least, in all
    int64_t free_ns = 0;
    int64_t left_ns = 0;  // at least so much work to come
    int64_t limit_bytes = 0;
    int64_t live_bytes = 0, held_bytes = 0;
    int64_t most_need = 0;
    int64_t pending_weights_ns = 0;
    int32_t pending_weights = 0;
    bool constrained = false;
    bool last_was_forward = false;
    Queue queue;                 // F, I, B
    Queue weights;               // W, ready
    std::vector<int32_t> begun;  // cells, oldest first
    std::vector<int32_t> sorted_roots;
    size_t next_root = 0;
    int32_t queued_roots = 0;
    std::vector<Task> strict_order;
    size_t strict_next = 0;
  };
  struct CellState {
    int64_t held = 0;
    int64_t need = 0;      // of the whole
    int64_t need_now = 0;  // of what is left
    int64_t frozen_peak = 0;
    int32_t next = 0, steps_end = 0;  // in steps_
    int32_t forwards_left = 0;
    int32_t frozen_left = 0;
    bool forwards_first = false;
  };
  // A pair, run as it is.
  struct PairRun {
    ListModel::Place place;
    int64_t length_ns[3];
    int64_t least_backward_ns;  // while it may be fused or not
    int64_t activation_bytes;
    int64_t gradient_bytes;  // while I or B runs; for I at least what W holds
    int64_t weight_bytes;    // from I to W
  };
  struct PairWaits {
    int64_t forward_ready_ns, gradient_ready_ns;
    int32_t forward, gradient;  // producers to come
  };
  enum class Admission { kYes, kAfterWeightGrad, kNo };

  void Prepare(const ListRule& rule, const Ways& ways, TaskOrder& order);
  void SetPair(int pair, const Ways& ways);
  int FastestThatFits(int pair) const;
  void PrepareWays(const Ways& ways);
  void PrepareMemory(Ways& ways);
  int64_t FindNeed(const ListModel::Cell& cell);
  void FeedRoots(Rank& rank);
  void FeedAllRoots(Rank& rank);
  void Feed(int pair);
  void Begin(int component);
  template <int kKind>
  void Push(int pair, int64_t arrival_ns);
  // Around up to `count` calls of Push.
  void BeginPushes(int count);
  void EndPushes();
  bool Pick(int r, Entry& picked);
  bool IsNextStep(Task task) const;
  Admission Admit(const Rank& rank, const Entry& entry) const;
  bool MayBegin(int component) const;
  void Finish(int component, int64_t now_ns);
  bool SafeToHold(const Rank& rank, int cell, int64_t bytes) const;
  bool SafeBehindOlder(const Rank& rank, int cell, int64_t bytes) const;
  void UpdateNeed(CellState& state) const;
  void Execute(int r, const Entry& entry);
  void SortStrict();
  bool PickStrict(int r, Entry& picked);
  bool PickInTurn(int r, Entry& picked);
  void ArriveGradient(int pair, int64_t at_ns);
  void DecideFused(const Rank& rank, int pair);
  void SettleForward(Rank& rank, int pair);
  void SettleGradient(Rank& rank, int pair, int64_t end_ns);
  void UpdateNextStart(int r);

  const ListModel& model_;
  const ProblemGraph& graph_;
  const ListRule* rule_ = nullptr;
  TaskOrder* order_ = nullptr;

  // Of the ways that were asked for last.
  Ways asked_;
  Ways taken_;                          // where they fit alone; else safe ones
  std::vector<int32_t> decided_;        // pairs set otherwise by DecideFused
  std::vector<PairRun> runs_;           // [pair]
  std::vector<int64_t> suffix_need_;    // [step]
  std::vector<CellState> first_cells_;  // [cell]: at the start
  std::vector<int64_t> frozen_peak_;    // [pair]: of it and those before it

  std::vector<PairWaits> first_waits_;  // [pair]: at the start
  std::vector<PairWaits> waits_;        // [pair]
  std::vector<uint8_t> step_done_;      // [step]
  std::vector<CellState> cells_;
  std::vector<Rank> ranks_;

  bool strict_ = false;                  // so far
  bool append_ = false;                  // Push leaves the sorting to EndPushes
  std::vector<int64_t> next_start_ns_;   // [rank]
  std::vector<uint8_t> fed_;             // [pair]
  std::vector<uint8_t> frozen_fed_;      // [sweep]: by Begin
  std::vector<int32_t> begun_;           // components, oldest first
  std::vector<uint8_t> is_begun_;        // [component]
  int64_t open_work_ns_ = 0;             // of those begun
  std::vector<int32_t> backwards_left_;  // [component]
};

// The length of a task, ns, its pair run as `ways` say: never kEither.
int64_t TaskLength(const ProblemGraph& graph, const Ways& ways, Task task);

// The order as the value that leaves the search.
Schedule ToSchedule(const ProblemGraph& graph, const TaskOrder& order);

// The way back; none when `schedule` is not a complete schedule of this problem
// that runs and fits.
std::optional<TaskOrder> FromSchedule(const ProblemGraph& graph,
                                      const Schedule& schedule);

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_LIST_SCHEDULER_H_
