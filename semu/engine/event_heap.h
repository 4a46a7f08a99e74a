// A heap of timed events: earliest first, ties by number.

#ifndef SEMU_ENGINE_EVENT_HEAP_H_
#define SEMU_ENGINE_EVENT_HEAP_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

#include "semu/engine/resource.h"

namespace pipeweaver::semu {

class EventHeap {
 public:
  void Clear() { events_.clear(); }
  void Push(int64_t time_ns, int number) {
    events_.emplace_back(time_ns, number);
    std::push_heap(events_.begin(), events_.end(), std::greater<>());
  }
  int64_t NextNs() const {
    return events_.empty() ? kNever : events_.front().first;
  }
  // REQUIRES: not empty.
  int Pop() {
    std::pop_heap(events_.begin(), events_.end(), std::greater<>());
    const int number = events_.back().second;
    events_.pop_back();
    return number;
  }

 private:
  std::vector<std::pair<int64_t, int>> events_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_ENGINE_EVENT_HEAP_H_
