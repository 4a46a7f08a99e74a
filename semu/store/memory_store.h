// A store in this process's memory.

#ifndef SEMU_STORE_MEMORY_STORE_H_
#define SEMU_STORE_MEMORY_STORE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "semu/base/mutex.h"
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
  // Prefetches many before it reads any: most is in no CPU cache.
  std::vector<std::optional<std::string>> GetAll(
      absl::Span<const absl::string_view> keys) override;
  void Put(absl::Span<const StoreEntry> entries) override;

  // Counted against the budget.
  int64_t bytes() const;

 private:
  static constexpr int kShards = 16;

  struct Held {
    std::string content;  // key, then value
    size_t key_bytes = 0;
    bool used = false;  // since its turn to go came last

    absl::string_view key() const { return {content.data(), key_bytes}; }
  };
  struct Shard {
    mutable Mutex mutex;
    // By the key's hash: of two keys with one hash the later is held.
    absl::flat_hash_map<size_t, Held> by_hash ABSL_GUARDED_BY(mutex);
    // Hashes of all that is held: the next to go, unless used, comes first.
    std::deque<size_t> turns ABSL_GUARDED_BY(mutex);
    int64_t bytes ABSL_GUARDED_BY(mutex) = 0;

    // Bytes of what is held under `hash`; 0: nothing is.
    int64_t BytesUnder(size_t hash) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
    // Drops the next to go, or puts it off. REQUIRES: something is held.
    void TakeTurn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex);
  };

  Shard& ShardOf(size_t hash);
  std::optional<std::string> Get(size_t hash, absl::string_view key);

  const int64_t shard_budget_bytes_;
  std::array<Shard, kShards> shards_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_MEMORY_STORE_H_
