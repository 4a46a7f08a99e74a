// See auth.h.

#include "server/auth.h"

#include <openssl/crypto.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "proto/digest/digest.h"

namespace pipeweaver::server {
namespace {

constexpr size_t kMinTokenSize = 16;
constexpr absl::string_view kScheme = "bearer ";

}  // namespace

absl::StatusOr<TokenAuth> TokenAuth::FromFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  if (!in) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_file: cannot read '", path, "'"));
  }
  const std::string content = text.str();
  const absl::string_view token = absl::StripAsciiWhitespace(content);
  if (token.size() < kMinTokenSize ||
      std::any_of(token.begin(), token.end(),
                  [](unsigned char c) { return !absl::ascii_isgraph(c); })) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_file: '", path, "' must hold one token of ",
                     kMinTokenSize, " or more printable characters"));
  }
  TokenAuth auth;
  auth.token_digest_ = Sha256(token);
  return auth;
}

absl::Status TokenAuth::Check(absl::string_view authorization) const {
  if (!required()) return absl::OkStatus();
  if (!absl::StartsWithIgnoreCase(authorization, kScheme)) {
    return absl::UnauthenticatedError(
        "authorization: missing, must be 'Bearer TOKEN'");
  }
  // Digests are of one length, so that the time tells nothing of the token's.
  const std::string digest = Sha256(authorization.substr(kScheme.size()));
  if (CRYPTO_memcmp(digest.data(), token_digest_.data(), digest.size()) != 0) {
    return absl::UnauthenticatedError("authorization: wrong token");
  }
  return absl::OkStatus();
}

}  // namespace pipeweaver::server
