// A few threads that run batches of numbered jobs: the parallel part of a
// deterministic search. Which thread runs a job must not matter to its result.

#ifndef SEARCH_STRATEGY_WORKER_POOL_H_
#define SEARCH_STRATEGY_WORKER_POOL_H_

#include <atomic>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "semu/base/mutex.h"

namespace pipeweaver::search {

class WorkerPool {
 public:
  // `threads` >= 1, the caller's included; fewer where the machine has no more.
  explicit WorkerPool(int threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int threads() const { return static_cast<int>(threads_.size()) + 1; }

  // Calls job(worker, index) for every index in [0, jobs), each once, on any
  // worker in [0, threads()), and waits for all of them. One call at a time.
  void Run(int jobs, const std::function<void(int worker, int index)>& job);

 private:
  void Serve(int worker);
  // Takes jobs until none is left.
  void Work(int worker) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  Mutex mutex_;
  // When there are jobs to take, or the end; when all are done.
  CondVar work_, done_;
  const std::function<void(int, int)>* job_ ABSL_GUARDED_BY(mutex_) = nullptr;
  int jobs_ ABSL_GUARDED_BY(mutex_) = 0;
  int next_ ABSL_GUARDED_BY(mutex_) = 0;
  int unfinished_ ABSL_GUARDED_BY(mutex_) = 0;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;
  // The same for those that wait awake, without the mutex.
  std::atomic<bool> to_serve_ = false;  // jobs to take, or the end
  std::atomic<bool> all_done_ = true;
  std::vector<std::thread> threads_;
};

// As pool->Run; on the calling thread, in order, where `pool` is null.
void RunOn(WorkerPool* pool, int jobs,
           const std::function<void(int worker, int index)>& job);

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_WORKER_POOL_H_
