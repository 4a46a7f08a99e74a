// A streaming, forgiving JSON reader for traces that other programs wrote.

#include "profiler/json_reader.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::profiler {
namespace {

// No trace nests deeper; a file of opening brackets must not fill the memory.
constexpr std::size_t kMaxDepth = 100'000;
// Longest name, key or number that is kept.
constexpr std::size_t kMaxTextBytes = 16 << 20;

bool IsSpace(int c) { return c == ' ' || c == '\n' || c == '\r' || c == '\t'; }

bool IsWordByte(int c) {
  return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
         (c >= 'A' && c <= 'Z') || c == '+' || c == '-' || c == '.';
}

// JSON's grammar for numbers, leading zeros and a leading '+' allowed, or a
// name for what is no finite number.
bool IsNumber(absl::string_view word) {
  absl::string_view rest = word;
  if (!rest.empty() && (rest.front() == '-' || rest.front() == '+'))
    rest.remove_prefix(1);
  if (absl::EqualsIgnoreCase(rest, "nan") ||
      absl::EqualsIgnoreCase(rest, "inf") ||
      absl::EqualsIgnoreCase(rest, "infinity")) {
    return true;
  }
  std::size_t at = 0;
  const auto digits = [&] {
    const std::size_t begin = at;
    while (at < rest.size() && rest[at] >= '0' && rest[at] <= '9') ++at;
    return at - begin;
  };
  std::size_t mantissa_digits = digits();
  if (at < rest.size() && rest[at] == '.') {
    ++at;
    mantissa_digits += digits();
  }
  if (mantissa_digits == 0) return false;
  if (at < rest.size() && (rest[at] == 'e' || rest[at] == 'E')) {
    ++at;
    if (at < rest.size() && (rest[at] == '-' || rest[at] == '+')) ++at;
    if (digits() == 0) return false;
  }
  return at == rest.size();
}

void AppendUtf8(uint32_t code_point, std::string* out) {
  if (code_point < 0x80) {
    out->push_back(static_cast<char>(code_point));
  } else if (code_point < 0x800) {
    out->push_back(static_cast<char>(0xC0 | (code_point >> 6)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  } else if (code_point < 0x10000) {
    out->push_back(static_cast<char>(0xE0 | (code_point >> 12)));
    out->push_back(static_cast<char>(0x80 | ((code_point >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  } else {
    out->push_back(static_cast<char>(0xF0 | (code_point >> 18)));
    out->push_back(static_cast<char>(0x80 | ((code_point >> 12) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | ((code_point >> 6) & 0x3F)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  }
}

// Length of the well-formed UTF-8 sequence at the start of `bytes`, 0 if none.
std::size_t Utf8Length(absl::string_view bytes) {
  const auto at = [&](std::size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t first = at(0);
  if (first < 0x80) return 1;
  const std::size_t length = first >= 0xC2 && first <= 0xDF   ? 2
                             : first >= 0xE0 && first <= 0xEF ? 3
                             : first >= 0xF0 && first <= 0xF4 ? 4
                                                              : 0;
  if (length == 0 || bytes.size() < length) return 0;
  for (std::size_t i = 1; i < length; ++i) {
    if ((at(i) & 0xC0) != 0x80) return 0;
  }
  // Overlong forms, surrogates, beyond U+10FFFF.
  if ((first == 0xE0 && at(1) < 0xA0) || (first == 0xED && at(1) > 0x9F) ||
      (first == 0xF0 && at(1) < 0x90) || (first == 0xF4 && at(1) > 0x8F)) {
    return 0;
  }
  return length;
}

void AppendQuoted(absl::string_view text, std::string* out) {
  out->push_back('"');
  for (const char c : text) {
    if (c == '"' || c == '\\') {
      out->push_back('\\');
      out->push_back(c);
    } else if (static_cast<uint8_t>(c) < 0x20) {
      absl::StrAppend(out, "\\u00",
                      absl::Hex(static_cast<uint8_t>(c), absl::kZeroPad2));
    } else {
      out->push_back(c);
    }
  }
  out->push_back('"');
}

}  // namespace

std::string ToValidUtf8(absl::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  while (!bytes.empty()) {
    const std::size_t length = Utf8Length(bytes);
    if (length == 0) {
      AppendUtf8(0xFFFD, &out);
      bytes.remove_prefix(1);
    } else {
      out.append(bytes.data(), length);
      bytes.remove_prefix(length);
    }
  }
  return out;
}

absl::Status JsonReader::Invalid(absl::string_view rule) const {
  return absl::InvalidArgumentError(
      absl::StrCat("byte ", offset(), ": ", rule));
}

absl::Status JsonReader::BreaksOff() const {
  return absl::DataLossError(absl::StrCat("byte ", offset(),
                                          ": the text breaks off, ",
                                          is_object_.size(), " brackets open"));
}

absl::StatusOr<int> JsonReader::Peek() {
  if (position_ == block_.size()) {
    if (at_end_) return -1;
    block_start_ += static_cast<int64_t>(block_.size());
    position_ = 0;
    block_ = absl::string_view();
    PW_ASSIGN_OR_RETURN(block_, source_.NextBlock());
    if (block_.empty()) {
      at_end_ = true;
      return -1;
    }
  }
  return static_cast<uint8_t>(block_[position_]);
}

absl::StatusOr<int> JsonReader::PeekPastSpace() {
  while (true) {
    while (position_ < block_.size() && IsSpace(block_[position_])) ++position_;
    if (position_ < block_.size())
      return static_cast<uint8_t>(block_[position_]);
    PW_ASSIGN_OR_RETURN(const int c, Peek());
    if (c < 0) return c;
  }
}

absl::Status JsonReader::Keep(absl::string_view bytes) {
  if (skipping_) return absl::OkStatus();
  if (bytes.size() > kMaxTextBytes - text_.size()) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "byte ", offset(), ": a string longer than ", kMaxTextBytes, " bytes"));
  }
  text_.append(bytes.data(), bytes.size());
  return absl::OkStatus();
}

absl::Status JsonReader::ReadHex4(uint32_t* value) {
  *value = 0;
  for (int i = 0; i < 4; ++i) {
    PW_ASSIGN_OR_RETURN(const int c, Peek());
    if (c < 0) return BreaksOff();
    if (!absl::ascii_isxdigit(static_cast<unsigned char>(c))) {
      return Invalid("\\u needs four hexadecimal digits");
    }
    *value = *value * 16 + (c <= '9' ? c - '0' : (c | 0x20) - 'a' + 10);
    ++position_;
  }
  return absl::OkStatus();
}

// Behind the backslash.
absl::Status JsonReader::ReadEscape() {
  PW_ASSIGN_OR_RETURN(const int c, Peek());
  if (c < 0) return BreaksOff();
  ++position_;
  switch (c) {
    case '"':
      return Keep("\"");
    case '\\':
      return Keep("\\");
    case '/':
      return Keep("/");
    case 'b':
      return Keep("\b");
    case 'f':
      return Keep("\f");
    case 'n':
      return Keep("\n");
    case 'r':
      return Keep("\r");
    case 't':
      return Keep("\t");
    case 'u':
      break;
    default: {
      const char kept[2] = {'\\', static_cast<char>(c)};
      return Keep(absl::string_view(kept, 2));
    }
  }
  uint32_t unit = 0;
  PW_RETURN_IF_ERROR(ReadHex4(&unit));
  std::string encoded;
  while (unit >= 0xD800 && unit <= 0xDBFF) {
    PW_ASSIGN_OR_RETURN(const int backslash, Peek());
    if (backslash != '\\') break;
    ++position_;
    PW_ASSIGN_OR_RETURN(const int u, Peek());
    if (u != 'u') {
      AppendUtf8(0xFFFD, &encoded);
      PW_RETURN_IF_ERROR(Keep(encoded));
      return ReadEscape();
    }
    ++position_;
    uint32_t low = 0;
    PW_RETURN_IF_ERROR(ReadHex4(&low));
    if (low >= 0xDC00 && low <= 0xDFFF) {
      AppendUtf8(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00), &encoded);
      return Keep(encoded);
    }
    AppendUtf8(0xFFFD, &encoded);
    unit = low;
  }
  AppendUtf8(unit >= 0xD800 && unit <= 0xDFFF ? 0xFFFD : unit, &encoded);
  return Keep(encoded);
}

// At the opening quote.
absl::Status JsonReader::ReadString() {
  text_.clear();
  ++position_;
  bool high_bytes = false;
  while (true) {
    const std::size_t begin = position_;
    while (position_ < block_.size()) {
      const char c = block_[position_];
      if (c == '"' || c == '\\') break;
      high_bytes |= static_cast<uint8_t>(c) >= 0x80;
      ++position_;
    }
    PW_RETURN_IF_ERROR(Keep(block_.substr(begin, position_ - begin)));
    PW_ASSIGN_OR_RETURN(const int c, Peek());
    if (c < 0) return BreaksOff();
    if (c == '"') {
      ++position_;
      if (high_bytes && !skipping_) text_ = ToValidUtf8(text_);
      return absl::OkStatus();
    }
    if (c == '\\') {
      ++position_;
      PW_RETURN_IF_ERROR(ReadEscape());
    }
  }
}

absl::Status JsonReader::ReadBareWord() {
  text_.clear();
  // A skipped number is checked like a kept one; only strings are long.
  while (true) {
    PW_ASSIGN_OR_RETURN(const int c, Peek());
    if (c < 0 || !IsWordByte(c)) return absl::OkStatus();
    if (text_.size() == kMaxTextBytes)
      return Invalid("a number or literal without an end");
    text_.push_back(static_cast<char>(c));
    ++position_;
  }
}

void JsonReader::ValueDone() {
  expect_ = is_object_.empty() ? Expect::kNothing : Expect::kCommaOrClose;
}

absl::StatusOr<JsonToken> JsonReader::Close(bool object) {
  if (is_object_.empty() || is_object_.back() != object) {
    return Invalid(object ? "'}' closes what '{' did not open"
                          : "']' closes what '[' did not open");
  }
  ++position_;
  is_object_.pop_back();
  ValueDone();
  return object ? JsonToken::kEndObject : JsonToken::kEndArray;
}

absl::StatusOr<JsonToken> JsonReader::Next() {
  PW_ASSIGN_OR_RETURN(int c, PeekPastSpace());
  if (!started_) {
    started_ = true;
    if (c == 0xEF) {  // a byte order mark
      for (const int expected : {0xEF, 0xBB, 0xBF}) {
        PW_ASSIGN_OR_RETURN(const int byte, Peek());
        if (byte != expected) return Invalid("expected a JSON value");
        ++position_;
      }
      PW_ASSIGN_OR_RETURN(c, PeekPastSpace());
    }
    if (c < 0)
      return absl::InvalidArgumentError(
          "byte 0: empty, expected a JSON document");
  }
  if (expect_ == Expect::kNothing) {
    if (c < 0) return JsonToken::kEnd;
    return Invalid("text after the end of the document");
  }
  if (c < 0) {
    ended_between_values_ = is_object_.size() == 1 && expect_ != Expect::kValue;
    return BreaksOff();
  }
  if (expect_ == Expect::kCommaOrClose) {
    if (c == ',') {
      ++position_;
      expect_ = is_object_.back() ? Expect::kKeyOrClose : Expect::kValueOrClose;
      return Next();
    }
    if (c == '}' || c == ']') return Close(c == '}');
    return Invalid("expected ',' or a closing bracket");
  }
  if (expect_ == Expect::kKeyOrClose) {
    if (c == '}') return Close(true);
    if (c != '"') return Invalid("expected a key in quotes");
    PW_RETURN_IF_ERROR(ReadString());
    PW_ASSIGN_OR_RETURN(const int colon, PeekPastSpace());
    if (colon < 0) return BreaksOff();
    if (colon != ':') return Invalid("expected ':' after a key");
    ++position_;
    expect_ = Expect::kValue;
    return JsonToken::kKey;
  }
  if (c == ']' && expect_ == Expect::kValueOrClose) return Close(false);
  if (c == '{' || c == '[') {
    if (is_object_.size() == kMaxDepth)
      return Invalid("brackets nested too deep");
    ++position_;
    is_object_.push_back(c == '{');
    expect_ = c == '{' ? Expect::kKeyOrClose : Expect::kValueOrClose;
    return c == '{' ? JsonToken::kBeginObject : JsonToken::kBeginArray;
  }
  if (c == '"') {
    PW_RETURN_IF_ERROR(ReadString());
    ValueDone();
    return JsonToken::kString;
  }
  if (IsWordByte(c)) {
    PW_RETURN_IF_ERROR(ReadBareWord());
    if (at_end_ && !is_object_.empty()) return BreaksOff();
    ValueDone();
    if (IsNumber(text_)) return JsonToken::kNumber;
    if (text_ == "true" || text_ == "false" || text_ == "null")
      return JsonToken::kLiteral;
    return Invalid(
        absl::StrCat("'", text_.substr(0, 40), "' is no JSON value"));
  }
  return Invalid("expected a JSON value");
}

absl::Status JsonReader::SkipValue() {
  const std::size_t depth_before = depth();
  skipping_ = true;
  absl::Status status;
  do {
    const absl::StatusOr<JsonToken> token = Next();
    status = token.status();
  } while (status.ok() && depth() > depth_before);
  skipping_ = false;
  return status;
}

absl::Status JsonReader::SkipRest() {
  const std::size_t depth_after = depth() - 1;
  skipping_ = true;
  absl::Status status;
  while (status.ok() && depth() > depth_after) status = Next().status();
  skipping_ = false;
  return status;
}

absl::StatusOr<std::string> JsonReader::CaptureValue(std::size_t max_bytes) {
  const std::size_t depth_before = depth();
  std::string out;
  const auto separate = [&out] {
    if (!out.empty() && out.back() != '[' && out.back() != '{' &&
        out.back() != ':')
      out.push_back(',');
  };
  do {
    PW_ASSIGN_OR_RETURN(const JsonToken token, Next());
    switch (token) {
      case JsonToken::kBeginObject:
        separate();
        out.push_back('{');
        break;
      case JsonToken::kBeginArray:
        separate();
        out.push_back('[');
        break;
      case JsonToken::kEndObject:
        out.push_back('}');
        break;
      case JsonToken::kEndArray:
        out.push_back(']');
        break;
      case JsonToken::kKey:
        separate();
        AppendQuoted(text_, &out);
        out.push_back(':');
        break;
      case JsonToken::kString:
        separate();
        AppendQuoted(text_, &out);
        break;
      case JsonToken::kNumber:
      case JsonToken::kLiteral:
        separate();
        out.append(text_);
        break;
      case JsonToken::kEnd:
        return absl::InternalError(
            "a value was expected at the end of the document");
    }
    if (out.size() > max_bytes) {
      while (depth() > depth_before) PW_RETURN_IF_ERROR(SkipRest());
      return std::string();
    }
  } while (depth() > depth_before);
  return out;
}

}  // namespace pipeweaver::profiler
