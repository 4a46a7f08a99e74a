#include "semu/store/record.h"

#include <string>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

// Worked out with sha256sum.
TEST(RecordTest, Vectors) {
  EXPECT_EQ(absl::BytesToHexString(RecordName("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(absl::BytesToHexString(EncodeRecord("abc", "xyz")),
            "ee11bf005915332c"
            "03000000"
            "616263"
            "78797a");
}

TEST(RecordTest, GivesBackTheValue) {
  EXPECT_EQ(DecodeRecord("abc", EncodeRecord("abc", "xyz")), "xyz");
  EXPECT_EQ(DecodeRecord("", EncodeRecord("", "")), "");
}

TEST(RecordTest, RefusesEveryDamage) {
  const std::string record = EncodeRecord("abc", "xyz");
  for (size_t i = 0; i < record.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string damaged = record;
      damaged[i] = static_cast<char>(damaged[i] ^ (1 << bit));
      EXPECT_EQ(DecodeRecord("abc", damaged), std::nullopt);
    }
    EXPECT_EQ(DecodeRecord("abc", record.substr(0, i)), std::nullopt);
  }
  EXPECT_EQ(DecodeRecord("abc", record + "!"), std::nullopt);
}

TEST(RecordTest, RefusesAnotherKeysRecord) {
  EXPECT_EQ(DecodeRecord("abd", EncodeRecord("abc", "xyz")), std::nullopt);
  EXPECT_EQ(DecodeRecord("ab", EncodeRecord("abc", "xyz")), std::nullopt);
}

}  // namespace
}  // namespace pipeweaver::semu
