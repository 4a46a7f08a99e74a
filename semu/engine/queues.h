// Queues: units that each work on one activity at a time, first come, first
// served. The ranks' compute streams are such units, and so are the two copy
// engines of each rank.

#ifndef SEMU_ENGINE_QUEUES_H_
#define SEMU_ENGINE_QUEUES_H_

#include <cstdint>
#include <vector>

#include "semu/engine/event_heap.h"
#include "semu/engine/resource.h"

namespace pipeweaver::semu {

class Queues final : public Resource {
 public:
  // An activity's unit and how long it takes.
  struct Activity {
    int unit = 0;
    int64_t duration_ns = 0;
  };

  // `activities` is indexed by activity and must outlive this object; each is
  // started at most once.
  Queues(int units, const std::vector<Activity>& activities)
      : activities_(activities), free_ns_(units, 0) {}

  void Start(int64_t now_ns, int activity) override {
    const Activity& a = activities_[activity];
    int64_t& free_ns = free_ns_[a.unit];
    free_ns = (free_ns > now_ns ? free_ns : now_ns) + a.duration_ns;
    ends_.Push(free_ns, activity);
  }

  int64_t NextEventNs(int64_t) override { return ends_.NextNs(); }

  void AdvanceTo(int64_t now_ns, std::vector<int>* ended) override {
    while (ends_.NextNs() <= now_ns) ended->push_back(ends_.Pop());
  }

 private:
  const std::vector<Activity>& activities_;
  std::vector<int64_t> free_ns_;  // [unit]
  EventHeap ends_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_ENGINE_QUEUES_H_
