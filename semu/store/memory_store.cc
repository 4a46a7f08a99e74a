#include "semu/store/memory_store.h"

#include <algorithm>
#include <array>

#include "absl/hash/hash.h"
#include "absl/strings/str_cat.h"

namespace pipeweaver::semu {
namespace {

// Of an entry beyond its key and value: map slot, turn, allocation.
constexpr int64_t kEntryBytes = 160;

int64_t BytesOf(size_t content_bytes) {
  return static_cast<int64_t>(content_bytes) + kEntryBytes;
}

// Entries that are prefetched together, and bytes of each at most: caches hold
// no more.
constexpr size_t kTogether = 64;
constexpr size_t kMostPrefetched = 1024;

void Prefetch(absl::string_view bytes) {
  constexpr size_t kCacheLine = 64;
  const size_t end = std::min(bytes.size(), kMostPrefetched);
  for (size_t i = 0; i < end; i += kCacheLine) {
    __builtin_prefetch(bytes.data() + i);
  }
}

}  // namespace

MemoryStore::MemoryStore(int64_t budget_bytes)
    : shard_budget_bytes_(budget_bytes / kShards) {}

MemoryStore::Shard& MemoryStore::ShardOf(size_t hash) {
  return shards_[hash % kShards];
}

std::optional<std::string> MemoryStore::Get(absl::string_view key) {
  return Get(absl::HashOf(key), key);
}

std::optional<std::string> MemoryStore::Get(size_t hash,
                                            absl::string_view key) {
  Shard& shard = ShardOf(hash);
  MutexLock lock(&shard.mutex);
  const auto it = shard.by_hash.find(hash);
  if (it == shard.by_hash.end() || it->second.key() != key) return std::nullopt;
  Held& held = it->second;
  held.used = true;
  return held.content.substr(held.key_bytes);
}

std::vector<std::optional<std::string>> MemoryStore::GetAll(
    absl::Span<const absl::string_view> keys) {
  std::vector<std::optional<std::string>> values;
  values.reserve(keys.size());
  std::array<size_t, kTogether> hashes;
  for (size_t begin = 0; begin < keys.size(); begin += kTogether) {
    const auto some = keys.subspan(begin, kTogether);
    for (size_t i = 0; i < some.size(); ++i) {
      hashes[i] = absl::HashOf(some[i]);
      Shard& shard = ShardOf(hashes[i]);
      MutexLock lock(&shard.mutex);
      shard.by_hash.prefetch(hashes[i]);
    }
    for (size_t i = 0; i < some.size(); ++i) {
      Shard& shard = ShardOf(hashes[i]);
      MutexLock lock(&shard.mutex);
      const auto it = shard.by_hash.find(hashes[i]);
      if (it != shard.by_hash.end()) Prefetch(it->second.content);
    }
    for (size_t i = 0; i < some.size(); ++i) {
      values.push_back(Get(hashes[i], some[i]));
    }
  }
  return values;
}

void MemoryStore::Put(absl::Span<const StoreEntry> entries) {
  for (const StoreEntry& entry : entries) {
    const int64_t bytes = BytesOf(entry.key.size() + entry.value.size());
    if (bytes > shard_budget_bytes_) continue;
    const size_t hash = absl::HashOf(absl::string_view(entry.key));
    Shard& shard = ShardOf(hash);
    MutexLock lock(&shard.mutex);
    while (shard.bytes - shard.BytesUnder(hash) + bytes > shard_budget_bytes_) {
      shard.TakeTurn();
    }
    shard.bytes += bytes - shard.BytesUnder(hash);
    const auto [it, added] = shard.by_hash.try_emplace(hash);
    if (added) shard.turns.push_back(hash);
    it->second.content = absl::StrCat(entry.key, entry.value);
    it->second.key_bytes = entry.key.size();
  }
}

int64_t MemoryStore::Shard::BytesUnder(size_t hash) const {
  const auto it = by_hash.find(hash);
  return it == by_hash.end() ? 0 : BytesOf(it->second.content.size());
}

void MemoryStore::Shard::TakeTurn() {
  const size_t hash = turns.front();
  turns.pop_front();
  const auto it = by_hash.find(hash);
  if (it->second.used) {
    it->second.used = false;
    turns.push_back(hash);
  } else {
    bytes -= BytesOf(it->second.content.size());
    by_hash.erase(it);
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
