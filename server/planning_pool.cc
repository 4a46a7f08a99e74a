// See planning_pool.h.

#include "server/planning_pool.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

#include "semu/base/check.h"

namespace pipeweaver::server {

PlanningPool::PlanningPool(int threads, int max_queued, int max_running_of_job,
                           int niceness)
    : num_threads_(threads),
      max_queued_(max_queued),
      max_running_of_job_(max_running_of_job) {
  PW_CHECK(threads >= 1 && max_queued >= 1 && max_running_of_job >= 1);
  workers_.reserve(threads);
  try {
    for (int i = 0; i < threads; ++i) {
      workers_.emplace_back([this, niceness] {
        // On Linux each thread has its own.
        if (niceness > 0) setpriority(PRIO_PROCESS, gettid(), niceness);
        Work();
      });
    }
  } catch (const std::system_error&) {
    Stop();
    throw;
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

void PlanningPool::StopTaking() {
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
}

void PlanningPool::Stop() {
  StopTaking();
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
      auto turn = NextTurn();
      while (!stopped_ && turn == turns_.end()) {
        changed_.Wait(&mutex_);
        turn = NextTurn();
      }
      if (stopped_) return;
      task = Take(turn);
      ++running_;
      ++running_of_[task.job];
    }
    const std::string job = task.job;
    task.run(/*dropped=*/task.cancelled->load());
    // What the task holds goes before the pool counts it as done.
    task = Task();
    MutexLock lock(&mutex_);
    --running_;
    const auto running = running_of_.find(job);
    if (--running->second == 0) running_of_.erase(running);
    // The job may have waited for this.
    changed_.NotifyOne();
  }
}

std::deque<std::string>::iterator PlanningPool::NextTurn() {
  auto turn = turns_.begin();
  while (turn != turns_.end()) {
    const auto running = running_of_.find(*turn);
    if (running == running_of_.end() || running->second < max_running_of_job_) {
      break;
    }
    ++turn;
  }
  return turn;
}

PlanningPool::Task PlanningPool::Take(
    const std::deque<std::string>::iterator& turn) {
  const std::string job = std::move(*turn);
  turns_.erase(turn);
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
