// A bounded ring of fixed-size records in shared memory, from one writing
// process to one reading process. The layout is plain and little-endian, so
// that any language can read it: a header of 4096 bytes, then the slots.
//
// Only libc and the C++ standard library: this runs inside trainers.

#ifndef PROFILER_CUPTI_RECORD_RING_H_
#define PROFILER_CUPTI_RECORD_RING_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

namespace pipeweaver::cupti {

enum class RecordKind : uint32_t { kKernel = 1, kCopy = 2 };

// Times of all kernels of one name (or of all copies) under one annotation in
// one step on one device. There may be several such records: readers add them
// up.
struct AgentRecord {
  int64_t step = -1;  // -1: launched outside every annotation
  RecordKind kind = RecordKind::kKernel;
  uint32_t device = 0;
  uint64_t count = 0;
  uint64_t total_ns = 0;
  uint64_t min_ns = 0;
  uint64_t max_ns = 0;
  // Zero-ended; of a text too long the end is replaced by '~' and 16
  // hexadecimal digits of its FNV-1a hash.
  char annotation[232] = {};
  char name[232] = {};
};
static_assert(sizeof(AgentRecord) == 512);

struct RingHeader {
  std::atomic<uint64_t> magic;  // the bytes "PWCUPTI1"
  uint32_t record_bytes;
  std::atomic<uint32_t> state;  // pw_cupti_state
  uint64_t slots;
  uint64_t pid;
  // Records ever written and ever read; record n stands in slot n % slots.
  std::atomic<uint64_t> written;
  std::atomic<uint64_t> read;
  // Records for which the ring had no room.
  std::atomic<uint64_t> dropped;
  // Activity records that CUPTI dropped, or that could not be kept.
  std::atomic<uint64_t> lost_activities;
  // Steps traced, and times that tracing gave way: to another CUPTI client, or
  // by pw_cupti_detach.
  std::atomic<uint64_t> traced_steps;
  std::atomic<uint64_t> yields;
};
static_assert(std::atomic<uint64_t>::is_always_lock_free);
inline constexpr std::size_t kRingHeaderBytes = 4096;
static_assert(sizeof(RingHeader) <= kRingHeaderBytes);

// Copies `text` into a record's field as the field's comment says.
void CopyText(const std::string& text, char* field, std::size_t field_bytes);

// Removes what processes that were killed have left: the rings whose paths
// begin with `prefix`, "/dev/shm/name-" say, and that no writer has open.
void RemoveLeftRings(const std::string& prefix);

// The writing end: makes the file, readable by its owner only, and removes its
// name when done; a reader that has it open keeps it. Not thread-safe.
class RingWriter {
 public:
  RingWriter() = default;
  ~RingWriter() { Close(); }
  RingWriter(const RingWriter&) = delete;
  RingWriter& operator=(const RingWriter&) = delete;

  // Replaces a file of that name. False with errno set.
  bool Open(const std::string& path, uint64_t slots);
  // Never waits: without room the record is counted as dropped.
  void Write(const AgentRecord& record);
  void Close();
  // Null when not open.
  RingHeader* header() { return header_; }

 private:
  std::string path_;
  int file_ = -1;  // locked, as long as the ring is in use
  RingHeader* header_ = nullptr;
  AgentRecord* slots_ = nullptr;
  // As made: what a reader does to the header cannot lead outside the map.
  uint64_t num_slots_ = 0;
};

// The reading end. Not thread-safe.
class RingReader {
 public:
  RingReader() = default;
  ~RingReader();
  RingReader(const RingReader&) = delete;
  RingReader& operator=(const RingReader&) = delete;

  // False, with a reason, where the file is absent or no such ring.
  bool Open(const std::string& path, std::string* reason);
  // The next record; false if there is none. Of more records than the ring has
  // slots, which no sound writer leaves, only as many are read.
  bool Read(AgentRecord* record);
  const RingHeader& header() const { return *header_; }

 private:
  RingHeader* header_ = nullptr;
  const AgentRecord* slots_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  // As found when opened: what the writer does later cannot lead outside the
  // map.
  uint64_t num_slots_ = 0;
};

}  // namespace pipeweaver::cupti

#endif  // PROFILER_CUPTI_RECORD_RING_H_
