#include "semu/store/memory_store.h"

#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pipeweaver::semu {
namespace {

// Of an entry beyond its key and value: list node, map slot.
constexpr int64_t kEntryBytes = 128;

int64_t BytesOf(size_t content_bytes) {
  return static_cast<int64_t>(content_bytes) + kEntryBytes;
}

}  // namespace

MemoryStore::MemoryStore(int64_t budget_bytes)
    : shard_budget_bytes_(budget_bytes / kShards) {}

MemoryStore::Shard& MemoryStore::ShardOf(const HashedKey& key) {
  // The high bits: the map inside takes the low ones.
  return shards_[(key.hash >> 56) % kShards];
}

std::optional<std::string> MemoryStore::Get(absl::string_view key) {
  const HashedKey hashed(key);
  Shard& shard = ShardOf(hashed);
  MutexLock lock(&shard.mutex);
  const auto it = shard.by_key.find(hashed);
  if (it == shard.by_key.end()) return std::nullopt;
  it->second->used = true;
  return it->second->content.substr(it->second->key_bytes);
}

void MemoryStore::Put(absl::Span<const StoreEntry> entries) {
  for (const StoreEntry& entry : entries) {
    const int64_t bytes = BytesOf(entry.key.size() + entry.value.size());
    if (bytes > shard_budget_bytes_) continue;
    HashedKey key(entry.key);
    Shard& shard = ShardOf(key);
    MutexLock lock(&shard.mutex);
    bool used = false;
    if (const auto it = shard.by_key.find(key); it != shard.by_key.end()) {
      used = it->second->used;
      shard.Erase(it->second);
    }
    while (shard.bytes + bytes > shard_budget_bytes_) {
      const auto last = std::prev(shard.entries.end());
      if (last->used) {
        last->used = false;
        shard.entries.splice(shard.entries.begin(), shard.entries, last);
      } else {
        shard.Erase(last);
      }
    }
    shard.entries.push_front(
        {absl::StrCat(entry.key, entry.value), entry.key.size(), used});
    key.bytes = shard.entries.front().key();
    shard.by_key.emplace(key, shard.entries.begin());
    shard.bytes += bytes;
  }
}

void MemoryStore::Shard::Erase(std::list<Held>::iterator held) {
  bytes -= BytesOf(held->content.size());
  by_key.erase(HashedKey(held->key()));
  entries.erase(held);
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
