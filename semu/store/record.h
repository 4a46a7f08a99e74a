// How a result is written where others may damage it or put something else: a
// file, a shared server.

#ifndef SEMU_STORE_RECORD_H_
#define SEMU_STORE_RECORD_H_

#include <optional>
#include <string>

#include "absl/strings/string_view.h"

namespace pipeweaver::semu {

inline constexpr int kRecordNameBytes = 32;

// What a record is found by: SHA-256 of its key.
std::string RecordName(absl::string_view key);

// The record of a key and its value:
//
//   bytes     content
//   0 .. 7    the first bytes of the SHA-256 of all that follows
//   8 .. 11   length of the key, little-endian
//   12 ..     key, value
//
// REQUIRES: the key is shorter than 2^32 bytes.
std::string EncodeRecord(absl::string_view key, absl::string_view value);

// The value; absent where the record is damaged or another key's.
std::optional<std::string> DecodeRecord(absl::string_view key,
                                        absl::string_view record);

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_RECORD_H_
