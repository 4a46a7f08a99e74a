// Keys of maps that know their hash.

#ifndef SEMU_STORE_HASHED_KEY_H_
#define SEMU_STORE_HASHED_KEY_H_

#include <cstddef>

#include "absl/hash/hash.h"
#include "absl/strings/string_view.h"

namespace pipeweaver::semu {

// A key, not owned, with its hash: keys are long, and looked for several times.
struct HashedKey {
  explicit HashedKey(absl::string_view key)
      : bytes(key), hash(absl::HashOf(key)) {}

  bool operator==(const HashedKey& other) const {
    return hash == other.hash && bytes == other.bytes;
  }

  absl::string_view bytes;
  size_t hash;
};

struct HashOfKey {
  size_t operator()(const HashedKey& key) const { return key.hash; }
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_HASHED_KEY_H_
