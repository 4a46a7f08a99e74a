// What a picture of a step shows: which rank computes what when, what crosses
// between ranks, and how much memory is live. A value; the writers of this
// folder turn it into files.

#ifndef SEMU_TRACE_TIMELINE_H_
#define SEMU_TRACE_TIMELINE_H_

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace pipeweaver::semu {

struct TimelineSpan {
  int rank = 0;
  int64_t start_ns = 0;
  int64_t end_ns = 0;
  char kind = 'F';  // F, B, I or W
  int module = 0;   // index into Timeline::modules
  int microbatch = 0;
  // More about the span, such as "sub-microbatch 3, segment 0, chunk 2".
  std::string detail;
};

struct TimelineTransfer {
  int from_span = 0;  // indices into Timeline::spans
  int to_span = 0;
  bool gradient = false;
  int64_t bytes = 0;
};

// Live bytes of a rank from `time_ns` on.
struct MemorySample {
  int64_t time_ns = 0;
  int64_t bytes = 0;
};

struct Timeline {
  std::string title;
  std::string subtitle;  // may be empty
  int ranks = 0;
  std::vector<std::string> modules;  // names
  std::vector<TimelineSpan> spans;   // of one rank: ascending
  std::vector<TimelineTransfer> transfers;
  // [rank], times ascending; empty: memory is not shown.
  std::vector<std::vector<MemorySample>> memory;
  // [rank]; empty: limits are not shown.
  std::vector<int64_t> memory_limit_bytes;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_TRACE_TIMELINE_H_
