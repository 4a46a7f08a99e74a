// A streaming, forgiving JSON reader for traces that other programs wrote.
//
// A kept library would be nlohmann's SAX parser or simdjson. Neither takes what
// real traces hold: NaN and Infinity, raw control characters and bytes that are
// no UTF-8 in names, backslashes of Windows paths; simdjson also wants the
// whole file in memory, and nlohmann hands integers beyond 64 bits over as
// doubles. Here a number stays the text that the file holds.

#ifndef PROFILER_JSON_READER_H_
#define PROFILER_JSON_READER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "semu/base/text_source.h"

namespace pipeweaver::profiler {

enum class JsonToken {
  kBeginObject,
  kEndObject,
  kBeginArray,
  kEndArray,
  kKey,
  kString,
  kNumber,   // NaN and infinities too
  kLiteral,  // true, false, null
  kEnd,      // the document is complete
};

// Reads one document, token by token. Memory: one block of the source, one bit
// per open bracket, and the text of one token. Not thread-safe.
//
// Besides JSON it takes: NaN, Infinity and -Infinity as numbers, raw control
// characters in strings, unknown escapes (kept as they stand), a comma before a
// closing bracket, a byte order mark. Bytes that are no UTF-8 become U+FFFD.
// Errors name the byte offset: INVALID_ARGUMENT for what is no JSON, DATA_LOSS
// for text that breaks off.
class JsonReader {
 public:
  // `source` must outlive the reader.
  explicit JsonReader(TextSource& source) : source_(source) {}

  // The next token.
  absl::StatusOr<JsonToken> Next();

  // Text of the last key, string, number or literal. Valid until the next call.
  const std::string& text() const { return text_; }

  // Passes over the value that comes next (after a key or inside an array),
  // without keeping any of it.
  absl::Status SkipValue();

  // Passes over the rest of an object or array whose opening token was the last
  // one read.
  absl::Status SkipRest();

  // The value that comes next, written back as compact JSON (numbers as they
  // stand). Empty for a value of more than `max_bytes`, which is passed over.
  absl::StatusOr<std::string> CaptureValue(std::size_t max_bytes);

  // Open brackets.
  std::size_t depth() const { return is_object_.size(); }
  // Bytes read so far.
  int64_t offset() const {
    return block_start_ + static_cast<int64_t>(position_);
  }
  // The text ended inside the outermost bracket, between two of its values.
  bool ended_between_values() const { return ended_between_values_; }

 private:
  // What may come next.
  enum class Expect {
    kValue,
    kValueOrClose,
    kKeyOrClose,
    kCommaOrClose,
    kNothing
  };

  // The next byte without taking it, -1 at the end.
  absl::StatusOr<int> Peek();
  absl::StatusOr<int> PeekPastSpace();
  absl::Status ReadString();
  absl::Status ReadEscape();
  absl::Status ReadHex4(uint32_t* value);
  absl::Status ReadBareWord();
  absl::StatusOr<JsonToken> Close(bool object);
  absl::Status Invalid(absl::string_view rule) const;
  absl::Status BreaksOff() const;
  // Appends to text_ unless the value is being skipped.
  absl::Status Keep(absl::string_view bytes);
  void ValueDone();

  TextSource& source_;
  absl::string_view block_;
  std::size_t position_ = 0;
  int64_t block_start_ = 0;
  bool at_end_ = false;
  bool started_ = false;
  bool skipping_ = false;
  bool ended_between_values_ = false;
  Expect expect_ = Expect::kValue;
  std::vector<bool> is_object_;
  std::string text_;
};

// `bytes` with everything that is no UTF-8 replaced by U+FFFD.
std::string ToValidUtf8(absl::string_view bytes);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_JSON_READER_H_
