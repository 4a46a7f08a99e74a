#include "semu/store/record.h"

#include <openssl/sha.h>

#include <cstdint>

namespace pipeweaver::semu {
namespace {

constexpr size_t kChecksumBytes = 8;
constexpr size_t kHeaderBytes = kChecksumBytes + 4;

std::string Sha256(absl::string_view bytes) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

}  // namespace

static_assert(kRecordNameBytes == SHA256_DIGEST_LENGTH);

std::string RecordName(absl::string_view key) { return Sha256(key); }

std::string EncodeRecord(absl::string_view key, absl::string_view value) {
  std::string record(kChecksumBytes, '\0');
  record.reserve(kHeaderBytes + key.size() + value.size());
  for (int i = 0; i < 4; ++i) {
    record.push_back(static_cast<char>(key.size() >> (8 * i) & 0xff));
  }
  record.append(key.data(), key.size());
  record.append(value.data(), value.size());
  const std::string digest =
      Sha256(absl::string_view(record).substr(kChecksumBytes));
  record.replace(0, kChecksumBytes, digest, 0, kChecksumBytes);
  return record;
}

std::optional<std::string> DecodeRecord(absl::string_view key,
                                        absl::string_view record) {
  if (record.size() < kHeaderBytes + key.size()) return std::nullopt;
  uint32_t key_bytes = 0;
  for (int i = 0; i < 4; ++i) {
    key_bytes |= static_cast<uint32_t>(
                     static_cast<unsigned char>(record[kChecksumBytes + i]))
                 << (8 * i);
  }
  if (key_bytes != key.size() ||
      record.substr(kHeaderBytes, key.size()) != key ||
      Sha256(record.substr(kChecksumBytes)).substr(0, kChecksumBytes) !=
          record.substr(0, kChecksumBytes)) {
    return std::nullopt;
  }
  return std::string(record.substr(kHeaderBytes + key.size()));
}

}  // namespace pipeweaver::semu
