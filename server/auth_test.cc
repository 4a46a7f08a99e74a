#include "server/auth.h"

#include <fstream>
#include <string>

#include "gtest/gtest.h"

namespace pipeweaver::server {
namespace {

TEST(TokenAuthTest, WithoutATokenEverybodyMayCall) {
  EXPECT_TRUE(TokenAuth().Check("").ok());
}

TEST(TokenAuthTest, OnlyTheTokenMayCall) {
  const std::string path = ::testing::TempDir() + "/token";
  std::ofstream(path) << "0123456789abcdef\n";
  const absl::StatusOr<TokenAuth> auth = TokenAuth::FromFile(path);
  ASSERT_TRUE(auth.ok()) << auth.status();
  EXPECT_TRUE(auth->Check("Bearer 0123456789abcdef").ok());
  EXPECT_TRUE(auth->Check("bearer 0123456789abcdef").ok());
  for (const char* wrong :
       {"", "Bearer ", "0123456789abcdef", "Basic 0123456789abcdef",
        "Bearer 0123456789abcdeX", "Bearer 0123456789abcdef0"}) {
    EXPECT_EQ(auth->Check(wrong).code(), absl::StatusCode::kUnauthenticated)
        << wrong;
  }
}

TEST(TokenAuthTest, RefusesFilesThatHoldNoToken) {
  EXPECT_FALSE(TokenAuth::FromFile("/nonexistent").ok());
  const std::string path = ::testing::TempDir() + "/two";
  std::ofstream(path) << "0123456789abcdef 0123456789abcdef\n";
  EXPECT_FALSE(TokenAuth::FromFile(path).ok());
}

}  // namespace
}  // namespace pipeweaver::server
