#include "semu/store/subgraph_cache.h"

#include <utility>

#include "absl/hash/hash.h"

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
  Shard& shard = shards_[absl::HashOf(key) % kShards];
  std::shared_ptr<Flight> flight;
  {
    MutexLock lock(&shard.mutex);
    const auto [it, first] = shard.flights.try_emplace(key);
    if (!first) {
      flight = it->second;
      while (!flight->value) shard.landed.Wait(&shard.mutex);
      joined_.fetch_add(1, std::memory_order_relaxed);
      return *flight->value;
    }
    flight = it->second = std::make_shared<Flight>();
  }
  std::string value = LookUp(key, compute);
  {
    MutexLock lock(&shard.mutex);
    flight->value = value;
    shard.flights.erase(key);
  }
  shard.landed.NotifyAll();
  return value;
}

std::string SubgraphCache::LookUp(absl::string_view key,
                                  absl::FunctionRef<std::string()> compute) {
  // The first level again: another flight may have landed since.
  std::optional<std::string> value;
  size_t found = 0;
  while (found < levels_.size()) {
    value = levels_[found]->Get(key);
    if (value) break;
    ++found;
  }
  if (value) {
    hits_[found].fetch_add(1, std::memory_order_relaxed);
  } else {
    value = compute();
    computed_.fetch_add(1, std::memory_order_relaxed);
  }
  const StoreEntry entry = {std::string(key), *value};
  for (size_t level = 0; level < found; ++level) levels_[level]->Put({entry});
  return *std::move(value);
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
