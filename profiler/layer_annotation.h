// The form in which trainers name a layer's pass in annotations (LayerKey in
// profile.proto).

#ifndef PROFILER_LAYER_ANNOTATION_H_
#define PROFILER_LAYER_ANNOTATION_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "pipeweaver/v1/profile.pb.h"

namespace pipeweaver::profiler {

// The key that an annotation names; empty for any other annotation, and for one
// that starts with "pw:" but has an unknown or repeated field, a bad figure, or
// no module, layer or pass.
std::optional<v1::LayerKey> ParseLayerAnnotation(absl::string_view name);

// The annotation of a key, figures that are 0 left out.
std::string LayerAnnotation(const v1::LayerKey& key);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_LAYER_ANNOTATION_H_
