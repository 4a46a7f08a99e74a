// A trace as compact records.

#include "profiler/trace_import.h"

#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::profiler {
namespace {

// Why the event's time cannot be used; empty if it can.
absl::string_view TimeProblem(const TraceEvent& event) {
  if (!event.start_ns) return "ts is absent or no number of int64 nanoseconds";
  if (!event.duration_ns)
    return "dur is absent or no number of int64 nanoseconds";
  if (*event.duration_ns < 0) return "dur is negative";
  if (*event.start_ns > INT64_MAX - *event.duration_ns)
    return "ts + dur is outside int64 nanoseconds";
  return "";
}

class Collector {
 public:
  absl::Status Add(const TraceEvent& event) {
    switch (event.category) {
      case TraceCategory::kKernel:
      case TraceCategory::kMemcpy:
      case TraceCategory::kMemset:
        AddDeviceRecord(event);
        break;
      case TraceCategory::kLaunch:
        AddLaunch(event);
        break;
      case TraceCategory::kOperator:
      case TraceCategory::kAnnotation:
      case TraceCategory::kGpuAnnotation:
        AddHostRecord(event);
        break;
      case TraceCategory::kOther:
        break;
    }
    return absl::OkStatus();
  }

  ImportedTrace Finish(TraceMetadata metadata) {
    trace_.metadata = std::move(metadata);
    return std::move(trace_);
  }

 private:
  void AddDeviceRecord(const TraceEvent& event) {
    if (const absl::string_view problem = TimeProblem(event);
        !problem.empty()) {
      if (++trace_.unusable_device_records == 1) {
        trace_.first_unusable =
            absl::StrCat("'", event.name.substr(0, 80), "': ", problem);
      }
      return;
    }
    DeviceRecord record;
    record.category = event.category;
    record.name = Intern(event.name);
    record.device = Intern(event.device.empty() ? event.process : event.device);
    record.stream = Intern(event.stream.empty() ? event.thread : event.stream);
    record.start_ns = *event.start_ns;
    record.duration_ns = *event.duration_ns;
    record.correlation = event.correlation.value_or(kNoId);
    record.external_id = event.external_id.value_or(kNoId);
    if (event.category == TraceCategory::kKernel) {
      CollectiveCall call;
      call.kind = CollectiveKindOf(event.name);
      if (call.kind != CollectiveKind::kNone) {
        call.name = Intern(event.collective_name);
        call.dtype = Intern(event.dtype);
        call.process_group = Intern(
            absl::StrCat(event.process_group, event.process_group_ranks));
        call.input_elements = event.input_elements.value_or(0);
        call.output_elements = event.output_elements.value_or(0);
        call.group_size = event.group_size.value_or(0);
        record.collective = static_cast<int32_t>(trace_.collectives.size());
        trace_.collectives.push_back(call);
      }
    }
    trace_.device_records.push_back(record);
  }

  void AddLaunch(const TraceEvent& event) {
    if (!event.correlation) return;
    LaunchRecord record;
    record.process = Intern(event.process);
    record.thread = Intern(event.thread);
    record.start_ns = event.start_ns.value_or(kNoId);
    record.correlation = *event.correlation;
    record.external_id = event.external_id.value_or(kNoId);
    trace_.launches.push_back(record);
  }

  void AddHostRecord(const TraceEvent& event) {
    if (!TimeProblem(event).empty()) return;
    HostRecord record;
    record.category = event.category;
    record.name = Intern(event.name);
    record.process = Intern(event.process);
    record.thread = Intern(event.thread);
    record.input_dims = Intern(event.input_dims);
    record.input_types = Intern(event.input_types);
    record.start_ns = *event.start_ns;
    record.duration_ns = *event.duration_ns;
    record.external_id = event.external_id.value_or(kNoId);
    trace_.host_records.push_back(record);
  }

  int32_t Intern(absl::string_view text) { return trace_.strings.Intern(text); }

  ImportedTrace trace_;
};

}  // namespace

int32_t StringTable::Intern(absl::string_view text) {
  const auto [entry, is_new] = numbers_.try_emplace(std::string(text), size());
  if (is_new) texts_.push_back(&entry->first);
  return entry->second;
}

absl::StatusOr<ImportedTrace> ImportTrace(TextSource& source) {
  Collector collector;
  PW_ASSIGN_OR_RETURN(TraceMetadata metadata,
                      ReadTrace(source, [&collector](const TraceEvent& event) {
                        return collector.Add(event);
                      }));
  return collector.Finish(std::move(metadata));
}

absl::StatusOr<ImportedTrace> ImportTraceFile(const std::string& path) {
  PW_ASSIGN_OR_RETURN(const std::unique_ptr<TextSource> source,
                      OpenTextFile(path));
  absl::StatusOr<ImportedTrace> trace = ImportTrace(*source);
  if (!trace.ok()) {
    return absl::Status(trace.status().code(),
                        absl::StrCat(path, ": ", trace.status().message()));
  }
  return trace;
}

std::unordered_map<int64_t, int32_t> LaunchesByCorrelation(
    const ImportedTrace& trace) {
  std::unordered_map<int64_t, int32_t> by_correlation;
  for (std::size_t i = 0; i < trace.launches.size(); ++i) {
    const LaunchRecord& launch = trace.launches[i];
    const int32_t index = static_cast<int32_t>(i);
    const auto [entry, is_new] =
        by_correlation.emplace(launch.correlation, index);
    if (is_new || entry->second < 0) continue;
    const LaunchRecord& first = trace.launches[entry->second];
    if (first.process != launch.process) {
      entry->second = -1;
    } else if (first.start_ns == kNoId && launch.start_ns != kNoId) {
      entry->second = index;
    }
  }
  return by_correlation;
}

}  // namespace pipeweaver::profiler
