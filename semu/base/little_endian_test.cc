#include "semu/base/little_endian.h"

#include <string>

#include "gtest/gtest.h"

namespace pipeweaver {
namespace {

TEST(LittleEndianTest, LowestByteFirst) {
  std::string bytes(8, '\0');
  EXPECT_EQ(PutLittleEndian64(0x0102030405060708, bytes.data()),
            bytes.data() + 8);
  EXPECT_EQ(bytes, "\x08\x07\x06\x05\x04\x03\x02\x01");
  EXPECT_EQ(LittleEndian64(bytes.data()), 0x0102030405060708u);
}

}  // namespace
}  // namespace pipeweaver
