#include "semu/store/subgraph_cache.h"

#include <utility>

namespace pipeweaver::semu {

SubgraphCache::SubgraphCache(std::vector<std::unique_ptr<SubgraphStore>> levels)
    : levels_(std::move(levels)), hits_(levels_.size()) {}

std::string SubgraphCache::GetOrCompute(
    absl::string_view key, absl::FunctionRef<std::string()> compute) {
  // What is at hand needs no flight.
  if (!levels_.empty()) {
    if (std::optional<std::string> value = levels_[0]->Get(key)) {
      hits_[0].fetch_add(1, std::memory_order_relaxed);
      return *std::move(value);
    }
  }
  const HashedKey hashed(key);
  bool first = false;
  std::shared_ptr<Flight> flight = Join(hashed, &first);
  if (!first) return Await(hashed, *flight);
  std::string value;
  LookUpAll(
      {{hashed, 0, std::move(flight)}}, [&](size_t) { return compute(); },
      absl::MakeSpan(&value, 1));
  return value;
}

std::vector<std::string> SubgraphCache::GetOrComputeAll(
    absl::Span<const std::string> keys,
    absl::FunctionRef<std::string(size_t)> compute) {
  std::vector<std::string> values(keys.size());
  std::vector<LookUp> own;
  std::vector<LookUp> others;
  std::vector<std::optional<std::string>> at_hand(keys.size());
  if (!levels_.empty()) {
    at_hand = levels_[0]->GetAll(
        std::vector<absl::string_view>(keys.begin(), keys.end()));
  }
  int64_t hits = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    if (at_hand[i]) {
      values[i] = *std::move(at_hand[i]);
      ++hits;
      continue;
    }
    const HashedKey key(keys[i]);
    bool first = false;
    std::shared_ptr<Flight> flight = Join(key, &first);
    (first ? own : others).push_back({key, i, std::move(flight)});
  }
  if (hits > 0) hits_[0].fetch_add(hits, std::memory_order_relaxed);
  LookUpAll(std::move(own), compute, absl::MakeSpan(values));
  // Only now, so that callers that wait for each other's keys all end.
  for (const LookUp& l : others) values[l.index] = Await(l.key, *l.flight);
  return values;
}

SubgraphCache::Shard& SubgraphCache::ShardOf(const HashedKey& key) {
  // The high bits: the map inside takes the low ones.
  return shards_[(key.hash >> 56) % kShards];
}

std::shared_ptr<SubgraphCache::Flight> SubgraphCache::Join(const HashedKey& key,
                                                           bool* first) {
  Shard& shard = ShardOf(key);
  MutexLock lock(&shard.mutex);
  const auto [it, inserted] = shard.flights.try_emplace(key);
  if (inserted) {
    it->second = std::make_shared<Flight>();
  } else {
    it->second->awaited = true;
  }
  *first = inserted;
  return it->second;
}

void SubgraphCache::Land(const LookUp& look_up, const std::string& value) {
  Shard& shard = ShardOf(look_up.key);
  {
    MutexLock lock(&shard.mutex);
    shard.flights.erase(look_up.key);
    if (!look_up.flight->awaited) return;
    look_up.flight->value = value;
  }
  shard.landed.NotifyAll();
}

std::string SubgraphCache::Await(const HashedKey& key, const Flight& flight) {
  Shard& shard = ShardOf(key);
  MutexLock lock(&shard.mutex);
  while (!flight.value) shard.landed.Wait(&shard.mutex);
  joined_.fetch_add(1, std::memory_order_relaxed);
  return *flight.value;
}

void SubgraphCache::LookUpAll(std::vector<LookUp> look_ups,
                              absl::FunctionRef<std::string(size_t)> compute,
                              absl::Span<std::string> values) {
  // The first level again: another flight may have landed since.
  for (size_t level = 0; level < levels_.size() && !look_ups.empty(); ++level) {
    std::vector<absl::string_view> keys;
    keys.reserve(look_ups.size());
    for (const LookUp& l : look_ups) keys.push_back(l.key.bytes);
    std::vector<std::optional<std::string>> found =
        levels_[level]->GetAll(keys);
    std::vector<StoreEntry> entries;
    std::vector<LookUp> missing;
    std::vector<LookUp> landing;
    for (size_t i = 0; i < look_ups.size(); ++i) {
      if (!found[i]) {
        missing.push_back(std::move(look_ups[i]));
        continue;
      }
      values[look_ups[i].index] = *std::move(found[i]);
      if (level > 0) {
        entries.push_back(
            {std::string(look_ups[i].key.bytes), values[look_ups[i].index]});
      }
      landing.push_back(std::move(look_ups[i]));
    }
    hits_[level].fetch_add(static_cast<int64_t>(landing.size()),
                           std::memory_order_relaxed);
    for (size_t front = 0; front < level; ++front) levels_[front]->Put(entries);
    for (const LookUp& l : landing) Land(l, values[l.index]);
    look_ups = std::move(missing);
  }
  // Those that wait for one of these wait for no other's computation.
  std::vector<StoreEntry> entries;
  StoreEntry entry;
  for (const LookUp& l : look_ups) {
    values[l.index] = compute(l.index);
    computed_.fetch_add(1, std::memory_order_relaxed);
    entry.key.assign(l.key.bytes.data(), l.key.bytes.size());
    entry.value = values[l.index];
    if (!levels_.empty()) levels_[0]->Put({&entry, 1});
    if (levels_.size() > 1) entries.push_back(entry);
    Land(l, values[l.index]);
  }
  for (size_t level = 1; level < levels_.size(); ++level) {
    if (!entries.empty()) levels_[level]->Put(entries);
  }
}

SubgraphCache::Counters SubgraphCache::counters() const {
  Counters counters;
  for (size_t level = 0; level < levels_.size(); ++level) {
    counters.levels.push_back(
        {std::string(levels_[level]->name()), hits_[level]});
  }
  counters.joined = joined_;
  counters.computed = computed_;
  return counters;
}

}  // namespace pipeweaver::semu
