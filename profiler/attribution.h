// Which operator and which annotation of the host each piece of device work
// belongs to.

#ifndef PROFILER_ATTRIBUTION_H_
#define PROFILER_ATTRIBUTION_H_

#include <cstdint>
#include <vector>

#include "profiler/trace_import.h"

namespace pipeweaver::profiler {

inline constexpr int32_t kUnattributed = -1;

// Indices into ImportedTrace::host_records, kUnattributed where there is none.
struct Attribution {
  // By device record: the innermost operator and annotation around its launch.
  std::vector<int32_t> operators;
  std::vector<int32_t> annotations;
  // By host record: the annotation around it, for annotations only.
  std::vector<int32_t> parent_annotations;
};

// A device record belongs to the runtime or driver call of the same correlation
// (the first in the file, if several), and that call to the innermost operator
// and annotation of its thread that cover its start. A thread without an
// annotation there (autograd's) takes the process's innermost one that covers
// the call on any thread. Without a launch record, the operator or annotation
// of the record's external id is taken.
Attribution Attribute(const ImportedTrace& trace);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_ATTRIBUTION_H_
