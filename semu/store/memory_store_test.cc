#include "semu/store/memory_store.h"

#include <atomic>
#include <cstdint>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

TEST(MemoryStoreTest, GivesBackWhatWasPut) {
  MemoryStore store(1 << 20);
  EXPECT_EQ(store.Get("key"), std::nullopt);
  store.Put({{"key", "value"}, {"other", ""}});
  EXPECT_EQ(store.Get("key"), "value");
  EXPECT_EQ(store.Get("other"), "");
  store.Put({{"key", "new"}});
  EXPECT_EQ(store.Get("key"), "new");
}

TEST(MemoryStoreTest, GivesBackAllThatIsAskedForTogether) {
  MemoryStore store(1 << 20);
  std::vector<std::string> names;
  std::vector<StoreEntry> entries;
  for (int i = 0; i < 200; ++i) {
    names.push_back(absl::StrCat("key", i));
    if (i % 3 > 0) entries.push_back({names[i], std::string(i * 5, 'v')});
  }
  store.Put(entries);
  const std::vector<absl::string_view> keys(names.begin(), names.end());
  const auto values = store.GetAll(keys);
  ASSERT_EQ(values.size(), keys.size());
  for (int i = 0; i < 200; ++i) {
    if (i % 3 > 0) {
      EXPECT_EQ(values[i], std::string(i * 5, 'v'));
    } else {
      EXPECT_EQ(values[i], std::nullopt);
    }
  }
  EXPECT_TRUE(store.GetAll({}).empty());
}

TEST(MemoryStoreTest, ANewValueOfAKeyCountsInPlaceOfTheOldOne) {
  MemoryStore store(64 << 10);
  store.Put({{"key", std::string(1000, 'a')}});
  const int64_t bytes = store.bytes();
  store.Put({{"key", std::string(100, 'b')}});
  EXPECT_EQ(store.bytes(), bytes - 900);
  // A longer one, where there is no room: the key's own entry may go first.
  for (int i = 0; i < 40; ++i) {
    store.Put({{absl::StrCat("key", i), std::string(1000, 'a')}});
  }
  for (int i = 0; i < 40; ++i) {
    store.Put({{absl::StrCat("key", i), std::string(3000, 'b')}});
    ASSERT_EQ(store.Get(absl::StrCat("key", i)), std::string(3000, 'b'));
    ASSERT_LE(store.bytes(), 64 << 10);
  }
}

TEST(MemoryStoreTest, StaysWithinItsBudgetAndKeepsWhatIsUsed) {
  constexpr int64_t kBudget = 64 << 10;
  MemoryStore store(kBudget);
  store.Put({{"used", "always"}});
  for (int i = 0; i < 10'000; ++i) {
    store.Put({{absl::StrCat("key", i), std::string(100, 'v')}});
    ASSERT_LE(store.bytes(), kBudget);
    ASSERT_EQ(store.Get("used"), "always") << i;
  }
  EXPECT_EQ(store.Get("key0"), std::nullopt);
  EXPECT_NE(store.Get("key9999"), std::nullopt);
  EXPECT_GT(store.bytes(), kBudget / 2);
}

TEST(MemoryStoreTest, TakesWhatIsNewWhereAllThatIsHeldIsUsed) {
  MemoryStore store(64 << 10);
  for (int i = 0; i < 2'000; ++i) {
    const std::string key = absl::StrCat("key", i);
    store.Put({{key, std::string(100, 'v')}});
    ASSERT_NE(store.Get(key), std::nullopt) << i;
  }
}

TEST(MemoryStoreTest, TakesNothingThatIsLargerThanAShard) {
  MemoryStore store(16 << 10);
  store.Put({{"key", std::string(4096, 'v')}});
  EXPECT_EQ(store.Get("key"), std::nullopt);
  EXPECT_EQ(store.bytes(), 0);
}

TEST(MemoryStoreTest, ManyThreadsNeverSeeAWrongValue) {
  MemoryStore store(32 << 10);
  std::vector<std::thread> threads;
  threads.reserve(4);
  std::atomic<int> wrong = 0;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&store, &wrong, t] {
      for (int i = 0; i < 5000; ++i) {
        const std::string key = absl::StrCat("key", (i * 7 + t) % 300);
        const auto value = i % 2 == 0 ? store.Get(key) : store.GetAll({key})[0];
        if (value && *value != key + key) ++wrong;
        if (!value) store.Put({{key, key + key}});
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

}  // namespace
}  // namespace pipeweaver::semu
