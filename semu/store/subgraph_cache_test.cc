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
  std::vector<std::optional<std::string>> GetAll(
      absl::Span<const absl::string_view> keys) override {
    {
      MutexLock lock(&mutex_);
      asked_.push_back(keys.size());
    }
    return SubgraphStore::GetAll(keys);
  }
  // Keys of each GetAll so far.
  std::vector<size_t> asked() {
    MutexLock lock(&mutex_);
    return asked_;
  }
  void Clear() {
    MutexLock lock(&mutex_);
    values_.clear();
  }

 private:
  const std::string name_;
  Mutex mutex_;
  std::map<std::string, std::string> values_ ABSL_GUARDED_BY(mutex_);
  std::vector<size_t> asked_ ABSL_GUARDED_BY(mutex_);
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

TEST(SubgraphCacheTest, AsksALevelOnceForManyKeys) {
  TwoLevels two;
  two.fast->Put({{"a", "a!"}});
  two.slow->Put({{"b", "b!"}, {"c", "c!"}});
  const std::vector<std::string> keys = {"d", "c", "a", "b", "d", "c", "e"};
  const auto compute = [&](size_t i) {
    EXPECT_TRUE(keys[i] == "d" || keys[i] == "e") << keys[i];
    return keys[i] + "!";
  };
  const std::vector<std::string> expected = {"d!", "c!", "a!", "b!",
                                             "d!", "c!", "e!"};
  EXPECT_EQ(two.cache->GetOrComputeAll(keys, compute), expected);
  EXPECT_EQ(two.slow->asked(), std::vector<size_t>{4});
  for (const char* key : {"a", "b", "c", "d", "e"}) {
    EXPECT_EQ(two.fast->Get(key), std::string(key) + "!");
  }
  EXPECT_EQ(two.slow->Get("d"), "d!");
  EXPECT_EQ(two.slow->Get("e"), "e!");
  const SubgraphCache::Counters counters = two.cache->counters();
  EXPECT_EQ(counters.levels[0].hits, 1);
  EXPECT_EQ(counters.levels[1].hits, 2);
  EXPECT_EQ(counters.computed, 2);
  EXPECT_EQ(counters.joined, 2);

  EXPECT_EQ(two.cache->GetOrComputeAll(keys, compute), expected);
  EXPECT_EQ(two.slow->asked().size(), 1u);
  EXPECT_TRUE(two.cache->GetOrComputeAll({}, compute).empty());
}

TEST(SubgraphCacheTest, WorksWithoutLevels) {
  SubgraphCache cache({});
  EXPECT_EQ(cache.GetOrCompute("k", [] { return std::string("v"); }), "v");
  EXPECT_EQ(cache.GetOrCompute("k", [] { return std::string("v"); }), "v");
  const auto compute = [](size_t) { return std::string("v"); };
  EXPECT_EQ(cache.GetOrComputeAll({"k"}, compute)[0], "v");
  EXPECT_EQ(cache.counters().computed, 3);
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
  threads.reserve(kThreads);
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

// Callers whose keys overlap, in orders that make them wait for each other.
TEST(SubgraphCacheTest, ComputesEachOfManyKeysOnceForManyThreads) {
  constexpr int kThreads = 4;
  constexpr int kKeys = 60;
  for (int round = 0; round < 50; ++round) {
    TwoLevels two;
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&two, t] {
        std::vector<std::string> keys;
        for (int i = 0; i < kKeys; ++i) {
          const int number = t % 2 == 0 ? i : kKeys - 1 - i;
          keys.push_back(absl::StrCat("key", number));
        }
        const std::vector<std::string> values = two.cache->GetOrComputeAll(
            keys, [&keys](size_t i) { return keys[i] + "!"; });
        for (int i = 0; i < kKeys; ++i) {
          ASSERT_EQ(values[i], keys[i] + "!");
          ASSERT_EQ(two.cache->GetOrCompute(keys[i], [] { return ""; }),
                    keys[i] + "!");
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(two.cache->counters().computed, kKeys);
  }
}

TEST(SubgraphCacheTest, KeysDoNotMixUnderLoad) {
  std::vector<std::unique_ptr<SubgraphStore>> levels;
  levels.push_back(std::make_unique<MemoryStore>(16 << 10));
  SubgraphCache cache(std::move(levels));
  std::vector<std::thread> threads;
  threads.reserve(4);
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
