// Threads for batches of jobs; see worker_pool.h.

#include "search/strategy/worker_pool.h"

#include <functional>
#include <system_error>
#include <thread>

#include "semu/base/mutex.h"

namespace pipeweaver::search {

WorkerPool::WorkerPool(int threads) {
  for (int worker = 1; worker < threads; ++worker) {
    try {
      threads_.emplace_back([this, worker] { Serve(worker); });
    } catch (const std::system_error&) {
      return;  // the machine has no more; those that are there will do
    }
  }
}

WorkerPool::~WorkerPool() {
  {
    MutexLock lock(&mutex_);
    ending_ = true;
  }
  changed_.NotifyAll();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::Work(int worker) {
  while (next_ < jobs_) {
    const int index = next_++;
    const std::function<void(int, int)>* const job = job_;
    mutex_.Unlock();
    (*job)(worker, index);
    mutex_.Lock();
    if (--unfinished_ == 0) changed_.NotifyAll();
  }
}

void WorkerPool::Serve(int worker) {
  MutexLock lock(&mutex_);
  while (true) {
    while (!ending_ && next_ >= jobs_) changed_.Wait(&mutex_);
    if (ending_) return;
    Work(worker);
  }
}

void WorkerPool::Run(int jobs, const std::function<void(int, int)>& job) {
  if (jobs == 0) return;
  MutexLock lock(&mutex_);
  job_ = &job;
  jobs_ = unfinished_ = jobs;
  next_ = 0;
  if (jobs > 1) changed_.NotifyAll();
  Work(0);
  while (unfinished_ > 0) changed_.Wait(&mutex_);
  jobs_ = next_ = 0;
}

void RunOn(WorkerPool* pool, int jobs,
           const std::function<void(int, int)>& job) {
  if (pool != nullptr) {
    pool->Run(jobs, job);
    return;
  }
  for (int i = 0; i < jobs; ++i) job(0, i);
}

}  // namespace pipeweaver::search
