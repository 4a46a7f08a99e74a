// Tests of input_file.h.

#include "search/problem/input_file.h"

#include <gtest/gtest.h>
#include <zlib.h>

#include <cstdio>
#include <string>

namespace pipeweaver::search {
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

TEST(GunzipTest, UnpacksOneMemberAndSeveral) {
  EXPECT_EQ(*Gunzip(Gzip("plan")), "plan");
  EXPECT_EQ(*Gunzip(Gzip("pipe") + Gzip("weaver")), "pipeweaver");
  EXPECT_EQ(*Gunzip(Gzip("")), "");
}

TEST(GunzipTest, RefusesDamage) {
  const std::string packed = Gzip("a plan of some length, to be cut");
  EXPECT_FALSE(Gunzip(packed.substr(0, packed.size() / 2)).ok());
  EXPECT_FALSE(Gunzip("no gzip at all").ok());
  EXPECT_FALSE(Gunzip("").ok());
  EXPECT_FALSE(Gunzip(packed + "x").ok());
}

TEST(GunzipTest, StopsABombAtItsLimit) {
  const std::string bomb = Gzip(std::string(1 << 22, 'x'));
  EXPECT_LT(bomb.size(), size_t{1} << 14);
  EXPECT_FALSE(Gunzip(bomb, (1 << 22) - 1).ok());
  EXPECT_TRUE(Gunzip(bomb, 1 << 22).ok());
}

TEST(ReadInputFileTest, ReadsPlainAndGzipByName) {
  const std::string base = testing::TempDir() + "/input_file_test";
  for (const bool gzip : {false, true}) {
    const std::string path = base + (gzip ? ".json.gz" : ".json");
    const std::string content = gzip ? Gzip("{}") : "{}";
    FILE* file = std::fopen(path.c_str(), "wb");
    ASSERT_NE(file, nullptr);
    std::fwrite(content.data(), 1, content.size(), file);
    std::fclose(file);
    EXPECT_EQ(*ReadInputFile(path), "{}");
    EXPECT_FALSE(ReadInputFile(path, 1).ok());
  }
  EXPECT_FALSE(ReadInputFile(base + ".missing").ok());
  EXPECT_FALSE(ReadInputFile(testing::TempDir()).ok());
}

}  // namespace
}  // namespace pipeweaver::search
