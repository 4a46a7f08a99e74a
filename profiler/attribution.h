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
  // By host record: the annotation around it, for annotations only. Following
  // them comes to an end.
  std::vector<int32_t> parent_annotations;
};

// A device record belongs to the runtime or driver call of the same correlation
// (LaunchesByCorrelation), and that call to the innermost operator and
// annotation of its thread that cover its start. A thread without an annotation
// there (autograd's) takes one of the process's other threads that covers the
// call: the last to start, of those inside a layer's range (layer_annotation.h)
// if there are any. In the same way an annotation that no other of its thread
// holds lies inside one of another thread that holds it whole, but no layer's
// range inside another layer's. Without a usable call, the operator of the
// record's external id is taken with the annotation around its start, or else
// the annotation of that id; none where an id is of several processes.
Attribution Attribute(const ImportedTrace& trace);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_ATTRIBUTION_H_
