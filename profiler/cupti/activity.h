// What the agent knows of an activity, whoever reports it: nothing here names
// CUPTI.

#ifndef PROFILER_CUPTI_ACTIVITY_H_
#define PROFILER_CUPTI_ACTIVITY_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace pipeweaver::cupti {

// A kernel or copy on a device.
struct DeviceActivity {
  bool is_copy = false;
  uint32_t device = 0;
  uint32_t correlation = 0;
  uint64_t start_ns = 0;
  uint64_t end_ns = 0;
  // Valid during the call only.
  const char* name = "";
};

// Receives activities. Not thread-safe.
class ActivitySink {
 public:
  virtual ~ActivitySink() = default;
  virtual void OnDeviceActivity(const DeviceActivity& activity) = 0;
  // The API call of this correlation was made under the id that the agent
  // pushed.
  virtual void OnExternalId(uint32_t correlation, uint64_t id) = 0;
};

// A full buffer, from the callback to the parser.
struct FilledBuffer {
  uint8_t* data = nullptr;
  std::size_t valid_bytes = 0;
  // What CUPTI needs to be asked for dropped records.
  void* context = nullptr;
  uint32_t stream = 0;
};

// Gives and takes buffers. Called on the trainer's threads: must not block.
class BufferOwner {
 public:
  virtual ~BufferOwner() = default;
  // A buffer of *bytes, 8-byte aligned; null only if memory itself ran out.
  virtual uint8_t* Request(std::size_t* bytes) = 0;
  virtual void Complete(const FilledBuffer& buffer) = 0;
};

// How an attempt to trace ended.
enum class SourceStatus {
  kOk,
  kBusy,        // another client traces: try again later
  kImpossible,  // for good: no GPU, no right
};

// Where activities come from. Thread-safe, but that Probe, Start and Stop are
// called by one thread at a time. Any call may call the owner back.
class ActivitySource {
 public:
  virtual ~ActivitySource() = default;
  // Whether another client has come. Cheap enough for every step.
  virtual SourceStatus Probe(std::string* reason) = 0;
  virtual SourceStatus Start(BufferOwner* owner, std::string* reason) = 0;
  virtual void Stop() = 0;
  // Asks for full buffers; `all` also for those with records not complete: at
  // the end only.
  virtual void Flush(bool all) = 0;
  // Records the buffer's activities; returns how many the source had dropped.
  virtual uint64_t Parse(const FilledBuffer& buffer, ActivitySink* sink) = 0;
  // On the calling thread: API calls from here on carry `id`.
  virtual void PushId(uint64_t id) = 0;
  virtual void PopId() = 0;
};

}  // namespace pipeweaver::cupti

#endif  // PROFILER_CUPTI_ACTIVITY_H_
