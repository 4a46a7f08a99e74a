#include "semu/store/subgraph_cache.h"

#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "semu/store/memory_store.h"

namespace pipeweaver::semu {
namespace {

// A level that the test looks into.
class MapStore : public SubgraphStore {
 public:
  explicit MapStore(std::string name) : name_(std::move(name)) {}
  absl::string_view name() const override { return name_; }
  std::optional<std::string> Get(absl::string_view key) override {
    MutexLock lock(&mutex_);
    const auto it = values_.find(std::string(key));
    if (it == values_.end()) return std::nullopt;
    return it->second;
  }
  void Put(absl::Span<const StoreEntry> entries) override {
    MutexLock lock(&mutex_);
    for (const StoreEntry& entry : entries) values_[entry.key] = entry.value;
  }
  void Clear() {
    MutexLock lock(&mutex_);
    values_.clear();
  }

 private:
  const std::string name_;
  Mutex mutex_;
  std::map<std::string, std::string> values_ ABSL_GUARDED_BY(mutex_);
};

struct TwoLevels {
  MapStore* fast = nullptr;
  MapStore* slow = nullptr;
  std::unique_ptr<SubgraphCache> cache;

  TwoLevels() {
    std::vector<std::unique_ptr<SubgraphStore>> levels;
    levels.push_back(std::make_unique<MapStore>("fast"));
    levels.push_back(std::make_unique<MapStore>("slow"));
    fast = static_cast<MapStore*>(levels[0].get());
    slow = static_cast<MapStore*>(levels[1].get());
    cache = std::make_unique<SubgraphCache>(std::move(levels));
  }
};

TEST(SubgraphCacheTest, FillsTheLevelsInFrontOfTheHit) {
  TwoLevels two;
  const auto never = [] {
    ADD_FAILURE() << "computed again";
    return std::string();
  };
  EXPECT_EQ(two.cache->GetOrCompute("k", [] { return std::string("v"); }), "v");
  EXPECT_EQ(two.fast->Get("k"), "v");
  EXPECT_EQ(two.slow->Get("k"), "v");
  two.fast->Clear();
  EXPECT_EQ(two.cache->GetOrCompute("k", never), "v");
  EXPECT_EQ(two.fast->Get("k"), "v");
  EXPECT_EQ(two.cache->GetOrCompute("k", never), "v");

  const SubgraphCache::Counters counters = two.cache->counters();
  ASSERT_EQ(counters.levels.size(), 2u);
  EXPECT_EQ(counters.levels[0].name, "fast");
  EXPECT_EQ(counters.levels[0].hits, 1);
  EXPECT_EQ(counters.levels[1].hits, 1);
  EXPECT_EQ(counters.computed, 1);
  EXPECT_EQ(counters.joined, 0);
}

TEST(SubgraphCacheTest, WorksWithoutLevels) {
  SubgraphCache cache({});
  EXPECT_EQ(cache.GetOrCompute("k", [] { return std::string("v"); }), "v");
  EXPECT_EQ(cache.GetOrCompute("k", [] { return std::string("v"); }), "v");
  EXPECT_EQ(cache.counters().computed, 2);
}

// The computation ends only when all others are about to ask; each of them
// finds the flight or its result.
TEST(SubgraphCacheTest, ComputesAKeyOnceForManyThreads) {
  constexpr int kThreads = 8;
  TwoLevels two;
  std::atomic<int> asking = 0;
  std::atomic<int> computed = 0;
  const auto compute = [&] {
    while (asking < kThreads) std::this_thread::yield();
    ++computed;
    return std::string("v");
  };
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      ++asking;
      EXPECT_EQ(two.cache->GetOrCompute("k", compute), "v");
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(computed, 1);
  const SubgraphCache::Counters counters = two.cache->counters();
  EXPECT_EQ(counters.computed, 1);
  EXPECT_EQ(counters.joined + counters.levels[0].hits, kThreads - 1);
}

TEST(SubgraphCacheTest, KeysDoNotMixUnderLoad) {
  std::vector<std::unique_ptr<SubgraphStore>> levels;
  levels.push_back(std::make_unique<MemoryStore>(16 << 10));
  SubgraphCache cache(std::move(levels));
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&cache, t] {
      for (int i = 0; i < 4000; ++i) {
        const std::string key = absl::StrCat("key", (i * 13 + t * 5) % 400);
        ASSERT_EQ(cache.GetOrCompute(key, [&key] { return key + "!"; }),
                  key + "!");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace pipeweaver::semu
