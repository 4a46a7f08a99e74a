// Threads for batches of jobs; see worker_pool.h.

#include "search/strategy/worker_pool.h"

#include <atomic>
#include <chrono>
#include <functional>
#include <system_error>
#include <thread>

#include "semu/base/mutex.h"

namespace pipeweaver::search {
namespace {

// Batches follow each other closely, and to wake a thread takes longer than to
// wait for the next one: on virtual machines up to a tenth of a millisecond.
constexpr std::chrono::microseconds kAwake(50);

// Waits awake for `flag`, so long at most.
void WaitAwake(const std::atomic<bool>& flag) {
  const auto until = std::chrono::steady_clock::now() + kAwake;
  while (!flag && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
}

}  // namespace

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
    to_serve_ = true;
  }
  work_.NotifyAll();
  for (std::thread& thread : threads_) thread.join();
}

void WorkerPool::Work(int worker) {
  while (next_ < jobs_) {
    const int index = next_++;
    if (next_ == jobs_) to_serve_ = ending_;
    const std::function<void(int, int)>* const job = job_;
    mutex_.Unlock();
    (*job)(worker, index);
    mutex_.Lock();
    if (--unfinished_ == 0) {
      all_done_ = true;
      done_.NotifyAll();
    }
  }
}

void WorkerPool::Serve(int worker) {
  while (true) {
    WaitAwake(to_serve_);
    MutexLock lock(&mutex_);
    while (!ending_ && next_ >= jobs_) work_.Wait(&mutex_);
    if (ending_) return;
    Work(worker);
  }
}

void WorkerPool::Run(int jobs, const std::function<void(int, int)>& job) {
  if (jobs == 0) return;
  {
    MutexLock lock(&mutex_);
    job_ = &job;
    jobs_ = unfinished_ = jobs;
    next_ = 0;
    all_done_ = false;
    to_serve_ = true;
    if (jobs > 1) work_.NotifyAll();
    Work(0);
  }
  WaitAwake(all_done_);
  MutexLock lock(&mutex_);
  while (unfinished_ > 0) done_.Wait(&mutex_);
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
