// A clock that stands still until a test moves it.

#ifndef SERVER_TESTING_FAKE_CLOCK_H_
#define SERVER_TESTING_FAKE_CLOCK_H_

#include <list>
#include <optional>
#include <utility>
#include <vector>

#include "semu/base/mutex.h"
#include "server/clock.h"

namespace pipeweaver::server {

class FakeClock final : public Clock {
 public:
  TimePoint Now() const override {
    MutexLock lock(&mutex_);
    return now_;
  }

  uint64_t UnixSeconds() const override { return 0; }

  // Moves the clock forward and wakes whoever waits on it.
  void Advance(Duration by) {
    std::vector<std::pair<Mutex*, CondVar*>> waiters;
    {
      MutexLock lock(&mutex_);
      now_ += by;
      waiters.assign(waiters_.begin(), waiters_.end());
    }
    for (const auto& [mutex, condition] : waiters) {
      MutexLock lock(mutex);
      condition->NotifyAll();
    }
  }

  void Wait(Mutex* mutex, CondVar* condition,
            std::optional<TimePoint> wake_at) override
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    std::list<std::pair<Mutex*, CondVar*>>::iterator self;
    {
      MutexLock lock(&mutex_);
      // Advance may have come between the caller's look at the clock and now.
      if (wake_at.has_value() && now_ >= *wake_at) return;
      self = waiters_.emplace(waiters_.end(), mutex, condition);
    }
    condition->Wait(mutex);
    MutexLock lock(&mutex_);
    waiters_.erase(self);
  }

 private:
  mutable Mutex mutex_;
  TimePoint now_ ABSL_GUARDED_BY(mutex_) = TimePoint(std::chrono::hours(1));
  std::list<std::pair<Mutex*, CondVar*>> waiters_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pipeweaver::server

#endif  // SERVER_TESTING_FAKE_CLOCK_H_
