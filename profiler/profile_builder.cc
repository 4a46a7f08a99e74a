// Measured points of a profile, from imported traces.

#include "profiler/profile_builder.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "profiler/attribution.h"
#include "profiler/collective_waiting.h"
#include "profiler/layer_annotation.h"
#include "profiler/profile_file.h"
#include "profiler/trace_figures.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::profiler {
namespace {

struct Samples {
  v1::PointKey key;
  std::vector<int64_t> times_ns;
  int64_t waiting_ns = 0;
  bool includes_waiting = false;
};

// By the key's serialized form, which is the same for equal keys (no maps in
// it); its order is the order of the points.
using SamplesByKey = std::map<std::string, Samples>;

Samples& SamplesOf(const v1::PointKey& key, SamplesByKey* all) {
  Samples& samples = (*all)[key.SerializeAsString()];
  samples.key = key;
  return samples;
}

absl::Status TooLong() {
  return absl::OutOfRangeError(
      "the sum of the times of a point is outside int64 nanoseconds");
}

// Bytes of an element by the name that PyTorch gives its type; 0 if not known.
int64_t ElementBytes(const std::string& dtype) {
  const std::string name = absl::AsciiStrToLower(dtype);
  const auto is = [&name](std::initializer_list<absl::string_view> names) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (is({"double", "long", "float64", "int64"})) return 8;
  if (is({"float", "int", "float32", "int32"})) return 4;
  if (is({"bfloat16", "half", "float16", "short", "int16"})) return 2;
  if (is({"byte", "char", "bool", "uint8", "int8", "float8_e4m3fn",
          "float8_e5m2"}))
    return 1;
  return 0;
}

std::string DeviceName(const TraceMetadata& metadata) {
  return metadata.device_names.empty() ? "" : metadata.device_names[0];
}

// The ranges that name a valid layer, by host record.
std::map<int32_t, v1::LayerKey> LayersOf(const ImportedTrace& trace) {
  std::map<int32_t, v1::LayerKey> layers;
  for (std::size_t h = 0; h < trace.host_records.size(); ++h) {
    const HostRecord& host = trace.host_records[h];
    if (host.category != TraceCategory::kAnnotation) continue;
    std::optional<v1::LayerKey> layer =
        ParseLayerAnnotation(trace.strings.Get(host.name));
    if (layer && ValidateLayerKey(*layer).ok()) {
      layers.emplace(static_cast<int32_t>(h), *std::move(layer));
    }
  }
  return layers;
}

// Whether a collective launched inside a layer's pass is a part of it, and not,
// for one, data parallelism's reduction of gradients. What is not known does
// not speak against it.
bool IsPartOf(const v1::LayerKey& layer, const CollectiveCall& call) {
  const int64_t tensor = layer.tensor_parallel();
  const int64_t context = layer.context_parallel();
  if (tensor == 0 || context == 0) return true;
  if (tensor * context == 1) return false;
  return call.group_size == 0 || call.group_size == tensor ||
         call.group_size == context || call.group_size == tensor * context;
}

// Device time of a range or call of the host.
struct HostTime {
  std::optional<int64_t> ns;
  bool includes_waiting = false;
};

// `collectives`: those of `trace`, ordered by record.
absl::Status AddHostPoints(const ImportedTrace& trace,
                           absl::Span<const CollectiveTime> collectives,
                           SamplesByKey* all) {
  const Attribution attribution = Attribute(trace);
  const std::map<int32_t, v1::LayerKey> layers = LayersOf(trace);
  std::vector<HostTime> times(trace.host_records.size());
  const auto add = [&times](int32_t host, int64_t duration_ns) {
    int64_t sum = times[host].ns.value_or(0);
    if (__builtin_add_overflow(sum, duration_ns, &sum)) return false;
    times[host].ns = sum;
    return true;
  };
  for (std::size_t r = 0; r < trace.device_records.size(); ++r) {
    const DeviceRecord& record = trace.device_records[r];
    if (record.category != TraceCategory::kKernel || record.collective >= 0)
      continue;
    if (const int32_t op = attribution.operators[r]; op != kUnattributed) {
      if (!add(op, record.duration_ns)) return TooLong();
    }
    for (int32_t range = attribution.annotations[r]; range != kUnattributed;
         range = attribution.parent_annotations[range]) {
      if (!add(range, record.duration_ns)) return TooLong();
    }
  }
  for (const CollectiveTime& collective : collectives) {
    const CollectiveCall& call =
        trace.collectives[trace.device_records[collective.record].collective];
    for (int32_t range = attribution.annotations[collective.record];
         range != kUnattributed;
         range = attribution.parent_annotations[range]) {
      const auto layer = layers.find(range);
      if (layer == layers.end() || !IsPartOf(layer->second, call)) continue;
      if (!add(range, collective.transfer_ns)) return TooLong();
      times[range].includes_waiting |= collective.includes_waiting;
    }
  }
  const std::string device = DeviceName(trace.metadata);
  for (std::size_t h = 0; h < trace.host_records.size(); ++h) {
    if (!times[h].ns) continue;
    const HostRecord& host = trace.host_records[h];
    v1::PointKey key;
    key.set_device(device);
    if (host.category == TraceCategory::kOperator) {
      key.set_kind(v1::POINT_KIND_OP);
      key.set_name(trace.strings.Get(host.name));
      key.set_input_shapes(trace.strings.Get(host.input_dims));
      key.set_dtype(trace.strings.Get(host.input_types));
    } else if (const auto layer = layers.find(static_cast<int32_t>(h));
               layer != layers.end() && *times[h].ns <= kMostLayerNs) {
      key.set_kind(v1::POINT_KIND_LAYER);
      *key.mutable_layer() = layer->second;
    } else {
      key.set_kind(v1::POINT_KIND_ANNOTATION);
      key.set_name(trace.strings.Get(host.name));
    }
    Samples& samples = SamplesOf(key, all);
    samples.times_ns.push_back(*times[h].ns);
    samples.includes_waiting |= times[h].includes_waiting;
  }
  return absl::OkStatus();
}

absl::Status AddCollectivePoints(const ImportedTrace& trace,
                                 absl::Span<const CollectiveTime> collectives,
                                 SamplesByKey* all) {
  for (const CollectiveTime& time : collectives) {
    const CollectiveCall& call =
        trace.collectives[trace.device_records[time.record].collective];
    v1::PointKey key;
    key.set_kind(v1::POINT_KIND_COLLECTIVE);
    key.set_name(std::string(CollectiveKindName(call.kind)));
    key.set_dtype(trace.strings.Get(call.dtype));
    key.set_device(DeviceName(trace.metadata));
    if (call.group_size > 0 &&
        call.group_size <= std::numeric_limits<int32_t>::max()) {
      key.set_group_size(static_cast<int32_t>(call.group_size));
    }
    int64_t bytes = 0;
    if (!__builtin_mul_overflow(call.input_elements, ElementBytes(key.dtype()),
                                &bytes) &&
        bytes > 0) {
      key.set_bytes(bytes);
    }
    Samples& samples = SamplesOf(key, all);
    samples.times_ns.push_back(time.transfer_ns);
    if (__builtin_add_overflow(samples.waiting_ns, time.waiting_ns,
                               &samples.waiting_ns)) {
      return TooLong();
    }
    samples.includes_waiting |= time.includes_waiting;
  }
  return absl::OkStatus();
}

absl::Status FillPoint(Samples& samples, v1::MeasuredPoint* point) {
  std::vector<int64_t>& times_ns = samples.times_ns;
  std::sort(times_ns.begin(), times_ns.end());
  int64_t total_ns = 0;
  for (const int64_t time_ns : times_ns) {
    if (__builtin_add_overflow(total_ns, time_ns, &total_ns)) return TooLong();
  }
  *point->mutable_key() = samples.key;
  point->set_count(static_cast<int64_t>(times_ns.size()));
  point->set_min_ns(times_ns.front());
  const std::size_t middle = times_ns.size() / 2;
  point->set_median_ns(times_ns.size() % 2 == 1
                           ? times_ns[middle]
                           : times_ns[middle - 1] +
                                 (times_ns[middle] - times_ns[middle - 1]) / 2);
  point->set_max_ns(times_ns.back());
  point->set_total_ns(total_ns);
  point->set_waiting_ns(samples.waiting_ns);
  point->set_includes_waiting(samples.includes_waiting);
  return absl::OkStatus();
}

absl::Status FillSource(const ProfileInput& input, v1::ProfileSource* source) {
  const TraceMetadata& metadata = input.trace.metadata;
  source->set_kind("kineto_trace");
  source->set_name(input.name);
  source->set_sha256(input.sha256);
  source->set_device(DeviceName(metadata));
  const auto add_software = [source](absl::string_view name,
                                     const std::string& version) {
    if (!version.empty())
      source->add_software(absl::StrCat(name, " ", version));
  };
  add_software("cuda_runtime", metadata.cuda_runtime_version);
  add_software("cuda_driver", metadata.cuda_driver_version);
  add_software("cupti", metadata.cupti_version);
  const auto int32_or_0 = [](const std::optional<int64_t>& value) {
    const bool fits =
        value && *value >= 0 && *value <= std::numeric_limits<int32_t>::max();
    return fits ? static_cast<int32_t>(*value) : 0;
  };
  source->set_rank(int32_or_0(metadata.rank));
  source->set_world_size(int32_or_0(metadata.world_size));
  PW_ASSIGN_OR_RETURN(const TraceFigures figures, ComputeFigures(input.trace));
  source->set_kernels(figures.kernels);
  source->set_unmatched_kernels(figures.unmatched_kernels);
  source->set_unusable_records(input.trace.unusable_device_records);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<v1::Profile> BuildProfile(
    const std::vector<ProfileInput>& inputs, int64_t version) {
  if (inputs.empty())
    return absl::InvalidArgumentError("a profile needs at least one trace");
  v1::Profile profile;
  profile.set_format_version(1);
  profile.set_version(version);
  std::vector<const ImportedTrace*> traces;
  traces.reserve(inputs.size());
  for (const ProfileInput& input : inputs) traces.push_back(&input.trace);
  const std::vector<CollectiveTime> collectives = SeparateWaiting(traces);
  SamplesByKey all;
  auto begin = collectives.begin();
  for (std::size_t i = 0; i < inputs.size(); ++i) {
    const auto end =
        std::find_if(begin, collectives.end(), [i](const CollectiveTime& time) {
          return time.trace != static_cast<int32_t>(i);
        });
    const absl::Span<const CollectiveTime> own(
        collectives.data() + (begin - collectives.begin()),
        static_cast<std::size_t>(end - begin));
    begin = end;
    PW_RETURN_IF_ERROR(FillSource(inputs[i], profile.add_sources()));
    PW_RETURN_IF_ERROR(AddHostPoints(inputs[i].trace, own, &all));
    PW_RETURN_IF_ERROR(AddCollectivePoints(inputs[i].trace, own, &all));
  }
  for (auto& [key, samples] : all)
    PW_RETURN_IF_ERROR(FillPoint(samples, profile.add_points()));
  return profile;
}

}  // namespace pipeweaver::profiler
