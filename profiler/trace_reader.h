// Reads the events of a Chrome trace as PyTorch/Kineto writes it, one at a
// time.
//
// Kineto's spelling changed over the years: categories `Kernel`, `Operator`,
// `Runtime` became `kernel`, `cpu_op`, `cuda_runtime`; `external id` became
// `External id`; times became decimals, then relative to `baseTimeNanoseconds`.
// All of it is taken, and numbers may stand in quotes.

#ifndef PROFILER_TRACE_READER_H_
#define PROFILER_TRACE_READER_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "semu/base/text_source.h"

namespace pipeweaver::profiler {

// What an event is, by its category in lower case.
enum class TraceCategory {
  kOther,
  kKernel,      // kernel
  kMemcpy,      // gpu_memcpy, memcpy
  kMemset,      // gpu_memset, memset
  kLaunch,      // runtime, driver, *_runtime, *_driver: the call that started
                // device work
  kOperator,    // cpu_op, operator
  kAnnotation,  // user_annotation: a range the trainer named
  kGpuAnnotation,  // gpu_user_annotation: such a range seen on the device
};

TraceCategory CategoryOf(const std::string& category);

// One complete event (`ph` X).
struct TraceEvent {
  TraceCategory category = TraceCategory::kOther;
  std::string name;
  // Process and thread as the file spells them.
  std::string process;
  std::string thread;
  // Empty where the file has no usable figure.
  std::optional<int64_t> start_ns;
  std::optional<int64_t> duration_ns;
  std::optional<int64_t> correlation;
  std::optional<int64_t> external_id;
  // Of kernels; empty where absent.
  std::string device;
  std::string stream;
  // Shapes and types of an operator's inputs, as compact JSON.
  std::string input_dims;
  std::string input_types;
  // Of collectives.
  std::string collective_name;
  std::string dtype;
  std::string process_group;
  std::string process_group_ranks;
  std::optional<int64_t> input_elements;
  std::optional<int64_t> output_elements;
  std::optional<int64_t> group_size;

  // Makes every field absent.
  void Clear();
};

// What stands beside the events.
struct TraceMetadata {
  std::optional<int64_t> base_time_ns;
  std::optional<int64_t> rank;
  std::optional<int64_t> world_size;
  // Names of the devices, in the file's order, without repeats.
  std::vector<std::string> device_names;
  std::string cuda_runtime_version;
  std::string cuda_driver_version;
  std::string cupti_version;
  std::string trace_name;
  // Events of any phase.
  int64_t events = 0;
};

// Reads a trace and hands every complete event to `visit`, in the file's order;
// the event is only valid during the call. Memory does not grow with the file.
// The document is an object with `traceEvents`, or the list of events itself
// (whose closing bracket may be missing, as the Chrome trace format allows).
//
// Errors name byte and rule: INVALID_ARGUMENT for what is no trace, DATA_LOSS
// for a file that breaks off, else what `visit` returned.
absl::StatusOr<TraceMetadata> ReadTrace(
    TextSource& source,
    const std::function<absl::Status(const TraceEvent&)>& visit);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_TRACE_READER_H_
