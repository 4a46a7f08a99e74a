// Tests of the streaming JSON reader, at every block size.

#include "profiler/json_reader.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::profiler {
namespace {

using ::testing::HasSubstr;

// All tokens in one line, or the error.
std::string Tokens(const std::string& text, std::size_t block_bytes = 1 << 16) {
  const std::unique_ptr<TextSource> source = TextFromString(text, block_bytes);
  JsonReader reader(*source);
  std::string out;
  while (true) {
    const absl::StatusOr<JsonToken> token = reader.Next();
    if (!token.ok()) return absl::StrCat(out, "!", token.status().message());
    switch (*token) {
      case JsonToken::kBeginObject:
        out += "{";
        break;
      case JsonToken::kEndObject:
        out += "}";
        break;
      case JsonToken::kBeginArray:
        out += "[";
        break;
      case JsonToken::kEndArray:
        out += "]";
        break;
      case JsonToken::kKey:
        absl::StrAppend(&out, "k<", reader.text(), ">");
        break;
      case JsonToken::kString:
        absl::StrAppend(&out, "s<", reader.text(), ">");
        break;
      case JsonToken::kNumber:
        absl::StrAppend(&out, "n<", reader.text(), ">");
        break;
      case JsonToken::kLiteral:
        absl::StrAppend(&out, "l<", reader.text(), ">");
        break;
      case JsonToken::kEnd:
        return out;
    }
  }
}

TEST(JsonReaderTest, ReadsAtEveryBlockSize) {
  const std::string text =
      R"( {"a": [1, -2.5e+3, true, null, "x\"\\\/\b\f\n\r\té😀"], "b": {}, "c": []} )";
  const std::string expected =
      "{k<a>[n<1>n<-2.5e+3>l<true>l<null>s<x\"\\/"
      "\b\f\n\r\t\xC3\xA9\xF0\x9F\x98\x80>]k<b>{}k<c>[]}";
  for (std::size_t block_bytes = 1; block_bytes <= text.size(); ++block_bytes) {
    EXPECT_EQ(Tokens(text, block_bytes), expected) << block_bytes;
  }
}

TEST(JsonReaderTest, KeepsNumbersAsText) {
  EXPECT_EQ(Tokens("[123456789012345678901234567890, 1.10, 1e400]"),
            "[n<123456789012345678901234567890>n<1.10>n<1e400>]");
}

TEST(JsonReaderTest, ForgivesWhatTracesHold) {
  EXPECT_EQ(Tokens("[NaN, Infinity, -Infinity, nan, -inf]"),
            "[n<NaN>n<Infinity>n<-Infinity>n<nan>n<-inf>]");
  EXPECT_EQ(Tokens("[1, 2, ]"), "[n<1>n<2>]");
  EXPECT_EQ(Tokens("{\"a\": 1, }"), "{k<a>n<1>}");
  EXPECT_EQ(Tokens("[\"C:\\Users\\x\"]"), "[s<C:\\Users\\x>]")
      << "unknown escapes stay";
  EXPECT_EQ(Tokens("[\"a\tb\nc\"]"), "[s<a\tb\nc>]");
  EXPECT_EQ(Tokens("[\"\xFF\xC3\xA9\xED\xA0\x80\"]"),
            "[s<\xEF\xBF\xBD\xC3\xA9\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD>]");
  EXPECT_EQ(Tokens("[\"\\ud800x\\udc00\\ud800\\n\"]"),
            "[s<\xEF\xBF\xBDx\xEF\xBF\xBD\xEF\xBF\xBD\n>]");
  EXPECT_EQ(Tokens("\xEF\xBB\xBF[1]"), "[n<1>]");
}

TEST(JsonReaderTest, NamesWhereItStops) {
  EXPECT_EQ(Tokens(""), "!byte 0: empty, expected a JSON document");
  EXPECT_EQ(Tokens("  \n"), "!byte 0: empty, expected a JSON document");
  EXPECT_THAT(Tokens("[1 2]"),
              HasSubstr("!byte 3: expected ',' or a closing bracket"));
  EXPECT_THAT(Tokens("[1}"),
              HasSubstr("!byte 2: '}' closes what '{' did not open"));
  EXPECT_THAT(Tokens("{1: 2}"), HasSubstr("!byte 1: expected a key in quotes"));
  EXPECT_THAT(Tokens("{\"a\" 2}"), HasSubstr("expected ':' after a key"));
  EXPECT_THAT(Tokens("{\"a\":}"), HasSubstr("expected a JSON value"));
  EXPECT_THAT(Tokens("[,]"), HasSubstr("expected a JSON value"));
  EXPECT_THAT(Tokens("[nul]"), HasSubstr("'nul' is no JSON value"));
  EXPECT_THAT(Tokens("[1-2]"), HasSubstr("'1-2' is no JSON value"));
  EXPECT_THAT(Tokens("[\"\\u12g4\"]"), HasSubstr("four hexadecimal digits"));
  EXPECT_THAT(Tokens("[] []"), HasSubstr("text after the end"));
  EXPECT_THAT(Tokens("<html>"), HasSubstr("expected a JSON value"));
}

TEST(JsonReaderTest, EveryPrefixBreaksOff) {
  const std::string text = R"({"a": [1, "x\n", {"b": true}], "c": 12})";
  for (std::size_t length = 1; length < text.size(); ++length) {
    EXPECT_THAT(Tokens(text.substr(0, length)),
                HasSubstr("the text breaks off"))
        << length;
  }
}

TEST(JsonReaderTest, DeepNestingIsAnErrorNotACrash) {
  EXPECT_THAT(Tokens(std::string(1'000'000, '[')),
              HasSubstr("nested too deep"));
}

TEST(JsonReaderTest, SkipsAndCaptures) {
  const std::unique_ptr<TextSource> source = TextFromString(
      R"({"a": {"x": ["y", {}]}, "b": [[1, 2.50], [], "q\"\u0001", {"k": null}], "c": 7})");
  JsonReader reader(*source);
  ASSERT_EQ(*reader.Next(), JsonToken::kBeginObject);
  ASSERT_EQ(*reader.Next(), JsonToken::kKey);
  ASSERT_TRUE(reader.SkipValue().ok());
  ASSERT_EQ(*reader.Next(), JsonToken::kKey);
  EXPECT_EQ(*reader.CaptureValue(1000),
            R"([[1,2.50],[],"q\"\u0001",{"k":null}])");
  ASSERT_EQ(*reader.Next(), JsonToken::kKey);
  EXPECT_EQ(reader.text(), "c");
  EXPECT_EQ(*reader.CaptureValue(1000), "7");
  ASSERT_EQ(*reader.Next(), JsonToken::kEndObject);
  EXPECT_EQ(*reader.Next(), JsonToken::kEnd);
}

TEST(JsonReaderTest, CapturePassesOverWhatIsTooLong) {
  const std::unique_ptr<TextSource> source =
      TextFromString("[[1,[2,3,4,5,6],7],[8]]");
  JsonReader reader(*source);
  ASSERT_EQ(*reader.Next(), JsonToken::kBeginArray);
  EXPECT_EQ(*reader.CaptureValue(8), "");
  EXPECT_EQ(*reader.CaptureValue(8), "[8]");
  EXPECT_EQ(*reader.Next(), JsonToken::kEndArray);
}

}  // namespace
}  // namespace pipeweaver::profiler
