// A trace as compact records: what ran on the devices, what launched it, and
// which operators and annotations of the host stood around the launch.

#ifndef PROFILER_TRACE_IMPORT_H_
#define PROFILER_TRACE_IMPORT_H_

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "profiler/collective_names.h"
#include "profiler/trace_reader.h"
#include "semu/base/text_source.h"

namespace pipeweaver::profiler {

// Strings by number; number 0 is the empty string. Not thread-safe.
class StringTable {
 public:
  StringTable() { Intern(""); }

  int32_t Intern(absl::string_view text);
  const std::string& Get(int32_t number) const { return *texts_[number]; }
  int32_t size() const { return static_cast<int32_t>(texts_.size()); }

 private:
  std::unordered_map<std::string, int32_t> numbers_;
  // Into the keys of numbers_, which do not move.
  std::vector<const std::string*> texts_;
};

// Stands for an absent correlation or external id.
inline constexpr int64_t kNoId = INT64_MIN;

// What the collective's own arguments say; 0 or "" where absent.
struct CollectiveCall {
  CollectiveKind kind = CollectiveKind::kNone;
  int32_t name = 0;
  int32_t dtype = 0;
  int32_t process_group = 0;  // name and ranks
  int64_t input_elements = 0;
  int64_t output_elements = 0;
  int64_t group_size = 0;
};

// Device work: a kernel, copy or fill. Strings are numbers of
// ImportedTrace::strings.
struct DeviceRecord {
  TraceCategory category = TraceCategory::kKernel;
  int32_t name = 0;
  int32_t device = 0;
  int32_t stream = 0;
  int32_t collective = -1;  // index into ImportedTrace::collectives
  int64_t start_ns = 0;
  int64_t duration_ns = 0;
  int64_t correlation = kNoId;
  int64_t external_id = kNoId;
};

// A runtime or driver call.
struct LaunchRecord {
  int32_t process = 0;
  int32_t thread = 0;
  int64_t start_ns = kNoId;
  int64_t correlation = kNoId;
  int64_t external_id = kNoId;
};

// An operator or annotation of the host.
struct HostRecord {
  TraceCategory category = TraceCategory::kOperator;
  int32_t name = 0;
  int32_t process = 0;
  int32_t thread = 0;
  int32_t input_dims = 0;
  int32_t input_types = 0;
  int64_t start_ns = 0;
  int64_t duration_ns = 0;
  int64_t external_id = kNoId;
};

struct ImportedTrace {
  TraceMetadata metadata;
  StringTable strings;
  std::vector<DeviceRecord> device_records;
  std::vector<LaunchRecord> launches;
  std::vector<HostRecord> host_records;
  std::vector<CollectiveCall> collectives;
  // Device work left out because its start or duration is absent, no number,
  // negative (a duration) or outside int64 nanoseconds; and the first such
  // case.
  int64_t unusable_device_records = 0;
  std::string first_unusable;
};

// Reads a trace. Memory grows with the records (at most 64 bytes each) and the
// distinct names, not with the file. Errors as ReadTrace.
absl::StatusOr<ImportedTrace> ImportTrace(TextSource& source);

// The same from a file, plain or gzip; errors carry the path.
absl::StatusOr<ImportedTrace> ImportTraceFile(const std::string& path);

// Indices into trace.launches: of several with one correlation the first that
// has a start, or else the first; -1 where they are of several processes, whose
// correlations are counted apart.
std::unordered_map<int64_t, int32_t> LaunchesByCorrelation(
    const ImportedTrace& trace);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_TRACE_IMPORT_H_
