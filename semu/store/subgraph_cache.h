// Results by key, computed at most once at a time.

#ifndef SEMU_STORE_SUBGRAPH_CACHE_H_
#define SEMU_STORE_SUBGRAPH_CACHE_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "semu/base/mutex.h"
#include "semu/store/hashed_key.h"
#include "semu/store/subgraph_store.h"

namespace pipeweaver::semu {

// Looks through its levels in order, computes what none has, and gives a result
// to every level in front of where it was found. Callers that ask for a key
// while it is being looked up wait for that one answer. Thread-safe.
class SubgraphCache {
 public:
  // Fastest level first.
  explicit SubgraphCache(std::vector<std::unique_ptr<SubgraphStore>> levels);

  // The value of `key`; `compute` makes it where no level has it, and must be a
  // pure function of the key.
  std::string GetOrCompute(absl::string_view key,
                           absl::FunctionRef<std::string()> compute);

  // GetOrCompute of each key, asking a level once for all that it may have;
  // `compute(i)` makes the value of keys[i].
  std::vector<std::string> GetOrComputeAll(
      absl::Span<const std::string> keys,
      absl::FunctionRef<std::string(size_t)> compute);

  struct Counters {
    struct Level {
      std::string name;
      int64_t hits = 0;
    };
    std::vector<Level> levels;
    // Answered by another caller's lookup.
    int64_t joined = 0;
    // Found nowhere.
    int64_t computed = 0;
  };
  Counters counters() const;

 private:
  static constexpr int kShards = 16;

  // A lookup under way. Guarded by its shard's mutex.
  struct Flight {
    bool awaited = false;              // by another caller
    std::optional<std::string> value;  // once landed, where it is awaited
  };
  struct Shard {
    Mutex mutex;
    CondVar landed;
    // By a key of the caller that began it.
    absl::flat_hash_map<HashedKey, std::shared_ptr<Flight>, HashOfKey> flights
        ABSL_GUARDED_BY(mutex);
  };

  // A key that the caller looks up for all.
  struct LookUp {
    HashedKey key;
    size_t index = 0;  // in the caller's keys
    std::shared_ptr<Flight> flight;
  };

  Shard& ShardOf(const HashedKey& key);
  // The flight of `key`; sets *first where the caller has begun it and must
  // land it.
  std::shared_ptr<Flight> Join(const HashedKey& key, bool* first);
  void Land(const LookUp& look_up, const std::string& value);
  std::string Await(const HashedKey& key, const Flight& flight);
  // Fills in values[l.index] for each and lands it.
  void LookUpAll(std::vector<LookUp> look_ups,
                 absl::FunctionRef<std::string(size_t)> compute,
                 absl::Span<std::string> values);

  const std::vector<std::unique_ptr<SubgraphStore>> levels_;
  std::vector<std::atomic<int64_t>> hits_;  // [level]
  std::atomic<int64_t> joined_ = 0;
  std::atomic<int64_t> computed_ = 0;
  std::array<Shard, kShards> shards_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_SUBGRAPH_CACHE_H_
