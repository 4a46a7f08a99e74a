// What the emulator sees of a resource: anything that works on activities in
// simulated time. An activity is a number; what it means is between the
// resource and whoever reads the result.

#ifndef SEMU_ENGINE_RESOURCE_H_
#define SEMU_ENGINE_RESOURCE_H_

#include <cstdint>
#include <limits>
#include <vector>

namespace pipeweaver::semu {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

class Resource {
 public:
  virtual ~Resource() = default;

  // Hands over an activity that may begin at `now_ns`; when it does begin is
  // the resource's decision.
  virtual void Start(int64_t now_ns, int activity) = 0;

  // Begins what can begin at `now_ns`; then the time of the next change,
  // >= now_ns, or kNever.
  virtual int64_t NextEventNs(int64_t now_ns) = 0;

  // Moves to `now_ns`, not past the next change. Appends the activities that
  // end then, in a fixed order.
  virtual void AdvanceTo(int64_t now_ns, std::vector<int>* ended) = 0;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_ENGINE_RESOURCE_H_
