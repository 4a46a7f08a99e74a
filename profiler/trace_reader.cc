// Reads the events of a Chrome trace as PyTorch/Kineto writes it, one at a
// time.

#include "profiler/trace_reader.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "profiler/decimal.h"
#include "profiler/json_reader.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::profiler {
namespace {

// Longest list of input shapes that is kept; longer ones carry no usable shape.
constexpr std::size_t kMaxShapeBytes = 64 << 10;

class Reader {
 public:
  Reader(TextSource& source,
         const std::function<absl::Status(const TraceEvent&)>& visit)
      : json_(source), visit_(visit) {}

  absl::StatusOr<TraceMetadata> Read() {
    PW_ASSIGN_OR_RETURN(const JsonToken first, json_.Next());
    if (first == JsonToken::kBeginArray) {
      const absl::Status status = ReadEvents();
      if (!status.ok() && !json_.ended_between_values()) return status;
      if (!status.ok()) return std::move(metadata_);
    } else if (first == JsonToken::kBeginObject) {
      PW_RETURN_IF_ERROR(ReadDocument());
    } else {
      return absl::InvalidArgumentError(
          "byte 0: a trace is an object with traceEvents or a list of events");
    }
    PW_RETURN_IF_ERROR(
        json_.Next().status());  // nothing stands behind the document
    return std::move(metadata_);
  }

 private:
  absl::Status ReadDocument() {
    bool has_events = false;
    while (true) {
      PW_ASSIGN_OR_RETURN(const JsonToken token, json_.Next());
      if (token == JsonToken::kEndObject) break;
      const std::string& key = json_.text();
      if (key == "traceEvents") {
        PW_ASSIGN_OR_RETURN(const JsonToken value, json_.Next());
        if (value != JsonToken::kBeginArray) {
          return absl::InvalidArgumentError(absl::StrCat(
              "byte ", json_.offset(), ": traceEvents is not a list"));
        }
        has_events = true;
        PW_RETURN_IF_ERROR(ReadEvents());
      } else if (key == "deviceProperties") {
        PW_RETURN_IF_ERROR(ReadDevices());
      } else if (key == "distributedInfo") {
        PW_RETURN_IF_ERROR(ReadDistributedInfo());
      } else if (key == "baseTimeNanoseconds") {
        PW_RETURN_IF_ERROR(ReadInteger(&metadata_.base_time_ns, 0));
      } else if (key == "cuda_runtime_version") {
        PW_RETURN_IF_ERROR(ReadText(&metadata_.cuda_runtime_version));
      } else if (key == "cuda_driver_version") {
        PW_RETURN_IF_ERROR(ReadText(&metadata_.cuda_driver_version));
      } else if (key == "cupti_version") {
        PW_RETURN_IF_ERROR(ReadText(&metadata_.cupti_version));
      } else if (key == "traceName") {
        PW_RETURN_IF_ERROR(ReadText(&metadata_.trace_name));
      } else {
        PW_RETURN_IF_ERROR(json_.SkipValue());
      }
    }
    if (!has_events)
      return absl::InvalidArgumentError("the document has no traceEvents");
    return absl::OkStatus();
  }

  // Inside the list's opening bracket.
  absl::Status ReadEvents() {
    while (true) {
      PW_ASSIGN_OR_RETURN(const JsonToken token, json_.Next());
      if (token == JsonToken::kEndArray) return absl::OkStatus();
      if (token == JsonToken::kBeginArray) {
        PW_RETURN_IF_ERROR(json_.SkipRest());
      } else if (token == JsonToken::kBeginObject) {
        PW_RETURN_IF_ERROR(ReadEvent());
      }
      ++metadata_.events;
    }
  }

  // Inside the event's opening bracket.
  absl::Status ReadEvent() {
    event_.Clear();
    bool complete = false;
    while (true) {
      PW_ASSIGN_OR_RETURN(const JsonToken token, json_.Next());
      if (token == JsonToken::kEndObject) break;
      const std::string& key = json_.text();
      if (key == "ph") {
        PW_RETURN_IF_ERROR(ReadText(&text_));
        complete = text_ == "X";
      } else if (key == "cat") {
        PW_RETURN_IF_ERROR(ReadText(&text_));
        event_.category = CategoryOf(text_);
      } else if (key == "name") {
        PW_RETURN_IF_ERROR(ReadText(&event_.name));
      } else if (key == "pid") {
        PW_RETURN_IF_ERROR(ReadText(&event_.process));
      } else if (key == "tid") {
        PW_RETURN_IF_ERROR(ReadText(&event_.thread));
      } else if (key == "ts") {
        PW_RETURN_IF_ERROR(ReadInteger(&event_.start_ns, 3));
      } else if (key == "dur") {
        PW_RETURN_IF_ERROR(ReadInteger(&event_.duration_ns, 3));
      } else if (key == "args") {
        PW_RETURN_IF_ERROR(ReadArguments());
      } else {
        PW_RETURN_IF_ERROR(json_.SkipValue());
      }
    }
    return complete ? visit_(event_) : absl::OkStatus();
  }

  absl::Status ReadArguments() {
    return ReadObject([this](const std::string& key) {
      if (key == "correlation") return ReadInteger(&event_.correlation, 0);
      if (key == "External id" || key == "external id")
        return ReadInteger(&event_.external_id, 0);
      if (key == "device") return ReadText(&event_.device);
      if (key == "stream") return ReadText(&event_.stream);
      if (key == "Input Dims" || key == "Input dims")
        return ReadShape(&event_.input_dims);
      if (key == "Input type") return ReadShape(&event_.input_types);
      if (key == "Collective name") return ReadText(&event_.collective_name);
      if (key == "dtype") return ReadText(&event_.dtype);
      if (key == "Process Group Name") return ReadText(&event_.process_group);
      if (key == "Process Group Ranks")
        return ReadShape(&event_.process_group_ranks);
      if (key == "In msg nelems") return ReadInteger(&event_.input_elements, 0);
      if (key == "Out msg nelems")
        return ReadInteger(&event_.output_elements, 0);
      if (key == "Group size") return ReadInteger(&event_.group_size, 0);
      return json_.SkipValue();
    });
  }

  absl::Status ReadDistributedInfo() {
    return ReadObject([this](const std::string& key) {
      if (key == "rank") return ReadInteger(&metadata_.rank, 0);
      if (key == "world_size") return ReadInteger(&metadata_.world_size, 0);
      return json_.SkipValue();
    });
  }

  absl::Status ReadDevices() {
    PW_ASSIGN_OR_RETURN(const JsonToken token, json_.Next());
    if (token == JsonToken::kBeginObject) return json_.SkipRest();
    if (token != JsonToken::kBeginArray) return absl::OkStatus();
    const std::size_t inside = json_.depth();
    while (true) {
      PW_ASSIGN_OR_RETURN(const JsonToken element, json_.Next());
      if (element == JsonToken::kEndArray && json_.depth() < inside)
        return absl::OkStatus();
      if (element == JsonToken::kBeginArray)
        PW_RETURN_IF_ERROR(json_.SkipRest());
      if (element != JsonToken::kBeginObject) continue;
      PW_RETURN_IF_ERROR(ReadFields([this](const std::string& key) {
        if (key != "name") return json_.SkipValue();
        PW_RETURN_IF_ERROR(ReadText(&text_));
        std::vector<std::string>& names = metadata_.device_names;
        if (std::find(names.begin(), names.end(), text_) == names.end())
          names.push_back(text_);
        return absl::OkStatus();
      }));
    }
  }

  // Hands every key of the object that comes next to `read_value`, which reads
  // the value. A value that is no object is passed over.
  template <typename ReadValue>
  absl::Status ReadObject(const ReadValue& read_value) {
    PW_ASSIGN_OR_RETURN(const JsonToken token, json_.Next());
    if (token == JsonToken::kBeginArray) return json_.SkipRest();
    if (token != JsonToken::kBeginObject) return absl::OkStatus();
    return ReadFields(read_value);
  }

  template <typename ReadValue>
  absl::Status ReadFields(const ReadValue& read_value) {
    while (true) {
      PW_ASSIGN_OR_RETURN(const JsonToken token, json_.Next());
      if (token == JsonToken::kEndObject) return absl::OkStatus();
      PW_RETURN_IF_ERROR(read_value(json_.text()));
    }
  }

  // Text of a string or number; nothing for null, objects and lists.
  absl::Status ReadText(std::string* out) {
    out->clear();
    PW_ASSIGN_OR_RETURN(const JsonToken token, json_.Next());
    if (token == JsonToken::kBeginObject || token == JsonToken::kBeginArray)
      return json_.SkipRest();
    if (token == JsonToken::kString || token == JsonToken::kNumber ||
        json_.text() != "null") {
      *out = json_.text();
    }
    return absl::OkStatus();
  }

  absl::Status ReadInteger(std::optional<int64_t>* out, int scale) {
    out->reset();
    PW_RETURN_IF_ERROR(ReadText(&number_));
    *out = ScaledDecimal(number_, scale);
    return absl::OkStatus();
  }

  absl::Status ReadShape(std::string* out) {
    out->clear();
    PW_ASSIGN_OR_RETURN(*out, json_.CaptureValue(kMaxShapeBytes));
    return absl::OkStatus();
  }

  JsonReader json_;
  const std::function<absl::Status(const TraceEvent&)>& visit_;
  TraceMetadata metadata_;
  TraceEvent event_;
  std::string text_;
  std::string number_;
};

}  // namespace

void TraceEvent::Clear() {
  category = TraceCategory::kOther;
  // The strings keep their memory: this runs once for every event of a file.
  for (std::string* text :
       {&name, &process, &thread, &device, &stream, &input_dims, &input_types,
        &collective_name, &dtype, &process_group, &process_group_ranks}) {
    text->clear();
  }
  for (std::optional<int64_t>* figure :
       {&start_ns, &duration_ns, &correlation, &external_id, &input_elements,
        &output_elements, &group_size}) {
    figure->reset();
  }
}

TraceCategory CategoryOf(const std::string& category) {
  const std::string name = absl::AsciiStrToLower(category);
  if (name == "kernel") return TraceCategory::kKernel;
  if (name == "gpu_memcpy" || name == "memcpy") return TraceCategory::kMemcpy;
  if (name == "gpu_memset" || name == "memset") return TraceCategory::kMemset;
  if (name == "cpu_op" || name == "operator") return TraceCategory::kOperator;
  if (name == "user_annotation") return TraceCategory::kAnnotation;
  if (name == "gpu_user_annotation") return TraceCategory::kGpuAnnotation;
  if (name == "runtime" || name == "driver" ||
      absl::EndsWith(name, "_runtime") || absl::EndsWith(name, "_driver")) {
    return TraceCategory::kLaunch;
  }
  return TraceCategory::kOther;
}

absl::StatusOr<TraceMetadata> ReadTrace(
    TextSource& source,
    const std::function<absl::Status(const TraceEvent&)>& visit) {
  return Reader(source, visit).Read();
}

}  // namespace pipeweaver::profiler
