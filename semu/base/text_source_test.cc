// Tests of text_source.h.

#include "semu/base/text_source.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <fstream>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace pipeweaver {
namespace {

std::string Gzip(const std::string& text) {
  z_stream stream{};
  EXPECT_EQ(
      deflateInit2(&stream, 9, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY),
      Z_OK);
  std::string out(deflateBound(&stream, text.size()), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(text.data()));
  stream.avail_in = static_cast<uInt>(text.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  out.resize(stream.total_out);
  deflateEnd(&stream);
  return out;
}

std::string Written(const std::string& content) {
  const std::string path = testing::TempDir() + "/text_source_test.txt";
  std::ofstream(path, std::ios::binary) << content;
  return path;
}

absl::StatusOr<std::string> Read(const std::string& content,
                                 std::size_t max_bytes = 1 << 23) {
  return ReadTextFile(Written(content), max_bytes);
}

TEST(TextSourceTest, ReadsPlainAndGzipByContent) {
  EXPECT_EQ(*Read("plan"), "plan");
  EXPECT_EQ(*Read(""), "");
  EXPECT_EQ(*Read(Gzip("plan")), "plan");
  EXPECT_EQ(*Read(Gzip("pipe") + Gzip("weaver")), "pipeweaver");
  EXPECT_EQ(*Read(Gzip("")), "");
}

TEST(TextSourceTest, RefusesDamage) {
  std::string packed = Gzip("a plan of some length, to be cut");
  EXPECT_EQ(Read(packed.substr(0, packed.size() / 2)).status().code(),
            absl::StatusCode::kDataLoss);
  packed[packed.size() / 2] ^= 0x40;
  EXPECT_EQ(Read(packed).status().code(), absl::StatusCode::kDataLoss);
}

TEST(TextSourceTest, StopsABombAtItsLimit) {
  const std::string bomb = Gzip(std::string(1 << 22, 'x'));
  EXPECT_LT(bomb.size(), std::size_t{1} << 14);
  EXPECT_EQ(Read(bomb, (1 << 22) - 1).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(Read(bomb, 1 << 22).ok());
}

TEST(TextSourceTest, NamesWhatCannotBeOpened) {
  const std::string missing = testing::TempDir() + "/text_source_test.missing";
  const absl::Status status = ReadTextFile(missing, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(status.message(), missing + ": No such file or directory");
  EXPECT_EQ(ReadTextFile(testing::TempDir(), 1).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(TextSourceTest, HandsOutTextInBlocks) {
  const std::unique_ptr<TextSource> source = TextFromString("abcde", 2);
  std::string blocks;
  while (true) {
    const absl::StatusOr<absl::string_view> block = source->NextBlock();
    ASSERT_TRUE(block.ok());
    if (block->empty()) break;
    blocks += std::string(*block) + "|";
  }
  EXPECT_EQ(blocks, "ab|cd|e|");
}

}  // namespace
}  // namespace pipeweaver
