// The clock that the server reads and waits by, injected so that tests decide
// what time it is.

#ifndef SERVER_CLOCK_H_
#define SERVER_CLOCK_H_

#include <chrono>
#include <cstdint>
#include <optional>

#include "semu/base/mutex.h"

namespace pipeweaver::server {

// Thread-safe.
class Clock {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;
  using Duration = std::chrono::steady_clock::duration;

  virtual ~Clock() = default;

  virtual TimePoint Now() const = 0;

  // Seconds since 1970, UTC.
  virtual uint64_t UnixSeconds() const = 0;

  // Waits on `condition` until it is notified or the clock reads `wake_at`
  // (nullopt: until notified). May return early: call in a loop.
  virtual void Wait(Mutex* mutex, CondVar* condition,
                    std::optional<TimePoint> wake_at)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) = 0;
};

// The machine's monotonic clock, and its calendar.
class SteadyClock final : public Clock {
 public:
  TimePoint Now() const override { return std::chrono::steady_clock::now(); }

  uint64_t UnixSeconds() const override {
    return std::chrono::system_clock::now().time_since_epoch() /
           std::chrono::seconds(1);
  }

  void Wait(Mutex* mutex, CondVar* condition,
            std::optional<TimePoint> wake_at) override
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex) {
    if (wake_at.has_value()) {
      condition->WaitUntil(mutex, *wake_at);
    } else {
      condition->Wait(mutex);
    }
  }
};

}  // namespace pipeweaver::server

#endif  // SERVER_CLOCK_H_
