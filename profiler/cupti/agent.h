// The agent: duty cycle, buffers, sums, and giving way. It knows activities
// only through ActivitySource.

#ifndef PROFILER_CUPTI_AGENT_H_
#define PROFILER_CUPTI_AGENT_H_

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "profiler/cupti/activity.h"
#include "profiler/cupti/pipeweaver_cupti.h"
#include "profiler/cupti/record_ring.h"

namespace pipeweaver::cupti {

struct AgentOptions {
  std::string ring_path;
  // 512 bytes each.
  uint64_t ring_slots = 16384;
  // Of every `period_steps` the first `active_steps` are traced; 1 <= active <=
  // period.
  int64_t active_steps = 2;
  int64_t period_steps = 100;
  // CUPTI takes a buffer for every thread that launches, and more for devices.
  std::size_t buffers = 16;
  std::size_t buffer_bytes = 2 << 20;
  // A guest's memory is bounded: of annotations, the last half as many as this
  // are known for certain, records of older ones are summed under ""; beyond
  // these limits kernels are summed under "<other>" and records are lost, and
  // counted.
  std::size_t max_texts = 1 << 16;
  std::size_t max_pending = 1 << 18;
  // After a traced window, time for kernels still running to end; and how often
  // sums are written out.
  int grace_ms = 2000;
};

// Buffers made in advance, handed out in any order. Thread-safe; waits for
// nothing but its own short lock.
class BufferPool : public BufferOwner {
 public:
  BufferPool(std::size_t buffers, std::size_t buffer_bytes);

  // Past the last buffer small ones are made, since older CUPTI crashes on
  // none.
  uint8_t* Request(std::size_t* bytes) override;
  void Complete(const FilledBuffer& buffer) override;

  // Buffers completed since the last call. Waits up to `wait_ms` for one.
  std::vector<FilledBuffer> TakeFilled(int wait_ms);
  // Gives a parsed buffer back.
  void Return(uint8_t* data);
  // Ends a wait.
  void Wake();

 private:
  struct Free {
    void operator()(uint8_t* data) const;
  };
  const std::size_t buffer_bytes_;
  std::vector<std::unique_ptr<uint8_t, Free>> prepared_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<uint8_t*> free_;        // guarded by mutex_
  std::vector<FilledBuffer> filled_;  // guarded by mutex_
  bool woken_ = false;                // guarded by mutex_
};

// Numbers for texts that never end to be new (a layer's pass names its sizes):
// those not used for long are forgotten. Not thread-safe.
class AnnotationNumbers {
 public:
  // Keeps at most `max_texts`, the last half of them for certain.
  explicit AnnotationNumbers(std::size_t max_texts)
      : max_young_(std::max<std::size_t>(1, max_texts / 2)) {}

  // The number of a text, from 1 on.
  uint32_t NumberOf(const std::string& text);
  // "" for a number that is forgotten or was never given.
  std::string TextOf(uint32_t number) const;

 private:
  struct Generation {
    std::unordered_map<std::string, uint32_t> numbers;
    std::unordered_map<uint32_t, std::string> texts;
  };
  const std::size_t max_young_;
  uint32_t last_ = 0;
  Generation young_;
  Generation old_;
};

// Thread-safe. At most one in a process.
class Agent {
 public:
  // `source` null: the agent is off because of `off_reason`.
  Agent(const AgentOptions& options, std::unique_ptr<ActivitySource> source,
        const std::string& off_reason);
  ~Agent();
  Agent(const Agent&) = delete;
  Agent& operator=(const Agent&) = delete;

  void Step(int64_t step);
  void Push(const char* annotation);
  void Pop();
  void Detach();
  void Attach();
  pw_cupti_state Status(std::string* reason);
  // Ends tracing and writes out. Later calls do nothing.
  void Stop();
  // In a forked child: from now on nothing is done, nothing freed.
  void ForgetInChild() { forked_.store(true, std::memory_order_relaxed); }

 private:
  // Sums what the worker parses; used by the worker only.
  class Sums : public ActivitySink {
   public:
    explicit Sums(Agent* agent) : agent_(agent) {}
    void OnDeviceActivity(const DeviceActivity& activity) override;
    void OnExternalId(uint32_t correlation, uint64_t id) override;
    // Writes all sums to the ring and forgets them. Activities whose id has not
    // come wait for the next time, unless this is the last.
    void WriteOut(RingWriter* ring, bool last);

   private:
    struct Pending {
      uint32_t name;
      uint32_t correlation;
      uint32_t device;
      RecordKind kind;
      int waited;  // write-outs
      uint64_t duration_ns;
    };
    // External id, name, device, kind.
    using Key = std::tuple<uint64_t, uint32_t, uint32_t, RecordKind>;
    struct Sum {
      uint64_t count = 0;
      uint64_t total_ns = 0;
      uint64_t min_ns = UINT64_MAX;
      uint64_t max_ns = 0;
    };
    uint32_t NameNumber(const char* name);
    std::optional<uint64_t> IdOf(uint32_t correlation) const;

    Agent* const agent_;
    std::unordered_map<std::string, uint32_t> name_numbers_;
    std::vector<std::string> names_;
    // Write-outs for which a kernel waits for its id, and an id for its
    // kernels: their buffers may come far apart.
    static constexpr int kStragglers = 4;
    // By correlation, of the time since the last write-out and those before it.
    std::unordered_map<uint32_t, uint64_t> ids_;
    std::array<std::unordered_map<uint32_t, uint64_t>, kStragglers> old_ids_;
    std::vector<Pending> pending_;
    std::map<Key, Sum> sums_;
  };

  void Work();
  // Under state_mutex_.
  void BeginWindow();
  void EndWindow();
  void GiveWay(const std::string& reason);
  void TurnOff(const std::string& reason);
  void SetState(pw_cupti_state state, const std::string& reason);
  uint64_t AnnotationId(const char* annotation);
  void CountLost(uint64_t records);

  const AgentOptions options_;
  const std::unique_ptr<ActivitySource> source_;
  BufferPool pool_;
  std::atomic<bool> forked_{false};
  // Read by Push on every layer; changed under state_mutex_.
  std::atomic<bool> tracing_{false};
  std::atomic<int64_t> step_{-1};

  // Never held while a lock of pool_ is taken by CUPTI's callbacks: source_ is
  // called under it, the callbacks take only pool_'s.
  std::mutex state_mutex_;
  pw_cupti_state state_ = PW_CUPTI_IDLE;  // guarded by state_mutex_
  std::string reason_;                    // guarded by state_mutex_
  bool detached_ = false;                 // guarded by state_mutex_
  bool stopped_ = false;                  // guarded by state_mutex_
  int64_t first_step_ = -1;               // guarded by state_mutex_
  bool said_busy_ = false;                // guarded by state_mutex_

  std::mutex annotations_mutex_;
  AnnotationNumbers annotations_;  // guarded by annotations_mutex_

  RingWriter ring_;  // worker; header's counters: any thread
  Sums sums_{this};  // worker
  std::atomic<bool> window_closed_{false};
  // CUPTI is another client's: flushing it is not ours to do.
  std::atomic<bool> hands_off_{true};
  std::atomic<bool> stopping_{false};
  std::thread worker_;
};

// One line on stderr, whole: "pipeweaver-cupti: ...".
void Say(const std::string& text);

}  // namespace pipeweaver::cupti

#endif  // PROFILER_CUPTI_AGENT_H_
