#include "semu/store/memory_store.h"

#include <utility>

#include "absl/hash/hash.h"

namespace pipeweaver::semu {
namespace {

// Of an entry beyond its key and value: list node, two strings, map slot.
constexpr int64_t kEntryBytes = 128;

int64_t BytesOf(const StoreEntry& entry) {
  return static_cast<int64_t>(entry.key.size() + entry.value.size()) +
         kEntryBytes;
}

}  // namespace

MemoryStore::MemoryStore(int64_t budget_bytes)
    : shard_budget_bytes_(budget_bytes / kShards) {}

MemoryStore::Shard& MemoryStore::ShardOf(absl::string_view key) {
  // The high bits: the map inside takes the low ones.
  return shards_[(absl::HashOf(key) >> 56) % kShards];
}

std::optional<std::string> MemoryStore::Get(absl::string_view key) {
  Shard& shard = ShardOf(key);
  MutexLock lock(&shard.mutex);
  const auto it = shard.by_key.find(key);
  if (it == shard.by_key.end()) return std::nullopt;
  shard.entries.splice(shard.entries.begin(), shard.entries, it->second);
  return it->second->value;
}

void MemoryStore::Put(absl::Span<const StoreEntry> entries) {
  for (const StoreEntry& entry : entries) {
    if (BytesOf(entry) > shard_budget_bytes_) continue;
    Shard& shard = ShardOf(entry.key);
    MutexLock lock(&shard.mutex);
    shard.entries.push_front(entry);
    const auto [it, inserted] = shard.by_key.try_emplace(
        shard.entries.front().key, shard.entries.begin());
    if (!inserted) {
      shard.entries.pop_front();
      shard.bytes -= BytesOf(*it->second);
      it->second->value = entry.value;
      shard.entries.splice(shard.entries.begin(), shard.entries, it->second);
    }
    shard.bytes += BytesOf(entry);
    while (shard.bytes > shard_budget_bytes_) {
      shard.bytes -= BytesOf(shard.entries.back());
      shard.by_key.erase(shard.entries.back().key);
      shard.entries.pop_back();
    }
  }
}

int64_t MemoryStore::bytes() const {
  int64_t bytes = 0;
  for (const Shard& shard : shards_) {
    MutexLock lock(&shard.mutex);
    bytes += shard.bytes;
  }
  return bytes;
}

}  // namespace pipeweaver::semu
