// Entries that tests know by number: what is stored can be told from what is
// wrong without keeping it.

#ifndef SEMU_STORE_TESTING_NUMBERED_ENTRIES_H_
#define SEMU_STORE_TESTING_NUMBERED_ENTRIES_H_

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "semu/store/subgraph_store.h"

namespace pipeweaver::semu {

inline StoreEntry NumberedEntry(int64_t round, int64_t batch, int64_t index) {
  const std::string key = absl::StrCat(round, "/", batch, "/", index);
  std::string value = key;
  // Some records need pages of their own.
  while (static_cast<int64_t>(value.size()) < 10 + index * index * 20) {
    value += value;
  }
  return {key, value};
}

inline constexpr int kNumberedBatch = 20;

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_TESTING_NUMBERED_ENTRIES_H_
