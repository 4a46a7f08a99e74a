// Bytes of a file, plain or gzip, one block at a time.

#ifndef SEMU_BASE_TEXT_SOURCE_H_
#define SEMU_BASE_TEXT_SOURCE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pipeweaver {

// Where text comes from. Not thread-safe.
class TextSource {
 public:
  virtual ~TextSource() = default;

  // The next block, empty at the end. It stays valid until the next call.
  // Fails with DATA_LOSS where the input breaks off or is corrupt.
  virtual absl::StatusOr<absl::string_view> NextBlock() = 0;
};

// A file; gzip is told by its first bytes, not by the name. Holds one block of
// 256 KiB, whatever the size of the file. Fails with NOT_FOUND or
// INVALID_ARGUMENT where the file cannot be opened.
absl::StatusOr<std::unique_ptr<TextSource>> OpenTextFile(
    const std::string& path);

// Text in memory, handed out in blocks of `block_bytes` (>= 1). Copies `text`.
std::unique_ptr<TextSource> TextFromString(std::string text,
                                           std::size_t block_bytes = 1 << 16);

// The whole of a file, plain or gzip. Fails with RESOURCE_EXHAUSTED beyond
// `max_bytes`.
absl::StatusOr<std::string> ReadTextFile(const std::string& path,
                                         std::size_t max_bytes);

}  // namespace pipeweaver

#endif  // SEMU_BASE_TEXT_SOURCE_H_
