// A store in this process's memory.

#ifndef SEMU_STORE_MEMORY_STORE_H_
#define SEMU_STORE_MEMORY_STORE_H_

#include <array>
#include <cstdint>
#include <list>
#include <optional>
#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "semu/base/mutex.h"
#include "semu/store/hashed_key.h"
#include "semu/store/subgraph_store.h"

namespace pipeweaver::semu {

// Keeps what was used of late: a budget of bytes, divided over shards with a
// lock each. Thread-safe.
class MemoryStore : public SubgraphStore {
 public:
  // `budget_bytes`: of keys, values and what it takes to find them, estimated.
  explicit MemoryStore(int64_t budget_bytes);

  absl::string_view name() const override { return "memory"; }
  std::optional<std::string> Get(absl::string_view key) override;
  void Put(absl::Span<const StoreEntry> entries) override;

  // Counted against the budget.
  int64_t bytes() const;

 private:
  static constexpr int kShards = 16;

  struct Held {
    std::string content;  // key, then value
    size_t key_bytes = 0;
    bool used = false;  // since it came to the front

    absl::string_view key() const { return {content.data(), key_bytes}; }
  };
  struct Shard {
    mutable Mutex mutex;
    // To go from the back on; what was used goes to the front instead.
    std::list<Held> entries ABSL_GUARDED_BY(mutex);
    // Keys point into `entries`.
    absl::flat_hash_map<HashedKey, std::list<Held>::iterator, HashOfKey> by_key
        ABSL_GUARDED_BY(mutex);
    int64_t bytes ABSL_GUARDED_BY(mutex) = 0;

    void Erase(std::list<Held>::iterator held)
        ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  };

  Shard& ShardOf(const HashedKey& key);

  const int64_t shard_budget_bytes_;
  std::array<Shard, kShards> shards_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_MEMORY_STORE_H_
