// See planning_pool.h.

#include "server/planning_pool.h"

#include <algorithm>

#include "semu/base/check.h"

namespace pipeweaver::server {

PlanningPool::PlanningPool(int threads, int max_queued)
    : num_threads_(threads), max_queued_(max_queued) {
  PW_CHECK(threads >= 1 && max_queued >= 1);
  workers_.reserve(threads);
  for (int i = 0; i < threads; ++i) {
    workers_.emplace_back([this] { Work(); });
  }
}

PlanningPool::~PlanningPool() { Stop(); }

bool PlanningPool::Reserve(int places) {
  MutexLock lock(&mutex_);
  if (stopped_ || queued_ + reserved_ + places > max_queued_) return false;
  reserved_ += places;
  return true;
}

void PlanningPool::Release() {
  MutexLock lock(&mutex_);
  PW_CHECK(reserved_ > 0);
  --reserved_;
}

void PlanningPool::Enqueue(Task task) {
  PW_CHECK(task.cancelled != nullptr);
  {
    MutexLock lock(&mutex_);
    PW_CHECK(reserved_ > 0);
    --reserved_;
    if (!stopped_) {
      ++queued_;
      auto& tasks = waiting_[task.job];
      if (tasks.empty()) turns_.push_back(task.job);
      const Order order{task.needed_at, next_sequence_++};
      tasks.emplace(order, std::move(task));
      changed_.NotifyOne();
      return;
    }
  }
  task.run(/*dropped=*/true);
}

void PlanningPool::DropCancelled() {
  std::vector<Task> dropped;
  {
    MutexLock lock(&mutex_);
    for (auto job = waiting_.begin(); job != waiting_.end();) {
      auto& tasks = job->second;
      for (auto it = tasks.begin(); it != tasks.end();) {
        if (it->second.cancelled->load()) {
          dropped.push_back(std::move(it->second));
          it = tasks.erase(it);
        } else {
          ++it;
        }
      }
      if (tasks.empty()) {
        turns_.erase(std::find(turns_.begin(), turns_.end(), job->first));
        job = waiting_.erase(job);
      } else {
        ++job;
      }
    }
    queued_ -= static_cast<int>(dropped.size());
  }
  for (const Task& task : dropped) task.run(/*dropped=*/true);
}

void PlanningPool::Stop() {
  std::vector<Task> dropped;
  {
    MutexLock lock(&mutex_);
    stopped_ = true;
    for (auto& [job, tasks] : waiting_) {
      for (auto& [order, task] : tasks) dropped.push_back(std::move(task));
    }
    waiting_.clear();
    turns_.clear();
    queued_ = 0;
    changed_.NotifyAll();
  }
  for (const Task& task : dropped) task.run(/*dropped=*/true);
  for (std::thread& worker : workers_) {
    if (worker.joinable()) worker.join();
  }
}

PlanningPool::Load PlanningPool::load() const {
  MutexLock lock(&mutex_);
  return {queued_, running_};
}

void PlanningPool::Work() {
  while (true) {
    Task task;
    {
      MutexLock lock(&mutex_);
      while (!stopped_ && queued_ == 0) changed_.Wait(&mutex_);
      if (stopped_) return;
      task = TakeNext();
      ++running_;
    }
    task.run(/*dropped=*/task.cancelled->load());
    // What the task holds goes before the pool counts it as done.
    task = Task();
    MutexLock lock(&mutex_);
    --running_;
  }
}

PlanningPool::Task PlanningPool::TakeNext() {
  const std::string job = turns_.front();
  turns_.pop_front();
  const auto entry = waiting_.find(job);
  auto& tasks = entry->second;
  Task task = std::move(tasks.begin()->second);
  tasks.erase(tasks.begin());
  --queued_;
  if (tasks.empty()) {
    waiting_.erase(entry);
  } else {
    turns_.push_back(job);
  }
  return task;
}

}  // namespace pipeweaver::server
