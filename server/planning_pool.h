// The threads that plan: a bounded queue, fair between jobs.

#ifndef SERVER_PLANNING_POOL_H_
#define SERVER_PLANNING_POOL_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "semu/base/mutex.h"
#include "server/clock.h"

namespace pipeweaver::server {

using CancelFlag = std::shared_ptr<std::atomic<bool>>;

// Takes turns between the jobs that have tasks waiting; of one job the task
// that is needed first, then the one that came first. Thread-safe.
class PlanningPool {
 public:
  struct Task {
    std::string job;  // whose turn it takes
    Clock::TimePoint needed_at = Clock::TimePoint::max();
    // Set: the task is dropped if it still waits. Never null.
    CancelFlag cancelled;
    // Called exactly once, on a worker with false, or with true when the task
    // was dropped (then on the thread that dropped it).
    std::function<void(bool dropped)> run;
  };

  struct Load {
    int queued = 0;
    int running = 0;
  };

  // `threads` >= 1; `max_queued` >= 1 tasks wait at most; of one job
  // `max_running_of_job` >= 1 run at a time, so that others find a thread. Its
  // threads, and those that they start, give way to others by `niceness` >= 0.
  // Throws std::system_error when not all threads can be started.
  PlanningPool(int threads, int max_queued,
               int max_running_of_job = std::numeric_limits<int>::max(),
               int niceness = 0);
  // Stops.
  ~PlanningPool();
  PlanningPool(const PlanningPool&) = delete;
  PlanningPool& operator=(const PlanningPool&) = delete;

  // Takes `places` in the queue, so that what is accepted can also be enqueued;
  // false: they are not there, or the pool is stopped. Each place is given back
  // by one Enqueue or Release.
  bool Reserve(int places = 1);
  void Release();

  // REQUIRES: a reserved place.
  void Enqueue(Task task);

  // Drops the waiting tasks that are cancelled. Call after setting flags.
  void DropCancelled();

  // Takes no more and drops what waits; what runs goes on. Idempotent.
  void StopTaking();
  // StopTaking, lets end what runs, and joins the threads. Idempotent, and not
  // to be called on a worker.
  void Stop();

  Load load() const;
  int threads() const { return num_threads_; }

 private:
  using Order = std::pair<Clock::TimePoint, uint64_t>;

  void Work();
  // The first job in line that may run a task now, or the end of turns_.
  std::deque<std::string>::iterator NextTurn()
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The next task of the job whose turn it is.
  Task Take(const std::deque<std::string>::iterator& turn)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const int num_threads_;
  const int max_queued_;
  const int max_running_of_job_;

  mutable Mutex mutex_;
  CondVar changed_;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  int reserved_ ABSL_GUARDED_BY(mutex_) = 0;
  int queued_ ABSL_GUARDED_BY(mutex_) = 0;
  int running_ ABSL_GUARDED_BY(mutex_) = 0;
  std::map<std::string, int> running_of_ ABSL_GUARDED_BY(mutex_);  // by job
  uint64_t next_sequence_ ABSL_GUARDED_BY(mutex_) = 0;
  // Jobs with waiting tasks, next turn first; each has an entry in `waiting_`.
  std::deque<std::string> turns_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::map<Order, Task>> waiting_ ABSL_GUARDED_BY(mutex_);

  std::vector<std::thread> workers_;
};

}  // namespace pipeweaver::server

#endif  // SERVER_PLANNING_POOL_H_
