// Messages from protobuf text that people write.

#ifndef PROTO_TEXT_TEXT_PROTO_H_
#define PROTO_TEXT_TEXT_PROTO_H_

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"

namespace pipeweaver {

// Fills `message` from `text`. Errors: INVALID_ARGUMENT naming `name`, the file
// say, with line and column of the first thing that is wrong.
absl::Status ParseTextProto(absl::string_view text, absl::string_view name,
                            google::protobuf::Message& message);

}  // namespace pipeweaver

#endif  // PROTO_TEXT_TEXT_PROTO_H_
