#include "semu/store/file_store.h"

#include <lmdb.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "semu/store/testing/numbered_entries.h"

namespace pipeweaver::semu {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kMaxBytes = 64 << 20;

class FileStoreTest : public ::testing::Test {
 protected:
  FileStoreTest()
      : path_(absl::StrCat(
            ::testing::TempDir(), "/",
            ::testing::UnitTest::GetInstance()->current_test_info()->name(),
            static_cast<int64_t>(getpid()))) {}

  std::unique_ptr<FileStore> Open(int64_t max_bytes = kMaxBytes) {
    auto store = FileStore::Open(
        path_, max_bytes, [this](auto line) { log_.emplace_back(line); });
    EXPECT_TRUE(store.ok()) << store.status();
    return *std::move(store);
  }
  std::string Read() const {
    std::ifstream in(path_, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void Write(const std::string& bytes) const {
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  // Fills a new file with batches of entries.
  void Fill(int batches) {
    const std::unique_ptr<FileStore> store = Open();
    for (int batch = 0; batch < batches; ++batch) {
      for (int i = 0; i < kNumberedBatch; ++i) {
        store->Put({NumberedEntry(0, batch, i)});
      }
    }
  }
  // Entries found; fails on a wrong value.
  int Found(FileStore& store, int batches) {
    int found = 0;
    for (int batch = 0; batch < batches; ++batch) {
      for (int i = 0; i < kNumberedBatch; ++i) {
        const StoreEntry expected = NumberedEntry(0, batch, i);
        const auto value = store.Get(expected.key);
        if (!value) continue;
        EXPECT_EQ(*value, expected.value);
        ++found;
      }
    }
    return found;
  }

  const std::string path_;
  std::vector<std::string> log_;
};

TEST_F(FileStoreTest, OutlivesItself) {
  {
    const auto store = Open();
    EXPECT_EQ(store->Get("key"), std::nullopt);
    store->Put({{"key", "old"}, {"other", ""}});
    store->Put({{"key", "value"}});
    EXPECT_EQ(store->Get("key"), "value");
  }
  const auto store = Open();
  EXPECT_EQ(store->Get("key"), "value");
  EXPECT_EQ(store->Get("other"), "");
  EXPECT_THAT(log_, IsEmpty());
}

TEST_F(FileStoreTest, TellsAForeignFile) {
  Write("#!/bin/sh\necho not a store\n");
  const auto store = Open();
  EXPECT_THAT(log_, ElementsAre(HasSubstr("is not of this format: moved to")));
  EXPECT_EQ(store->Get("key"), std::nullopt);
  store->Put({{"key", "value"}});
  EXPECT_EQ(store->Get("key"), "value");
  // What was there is still somewhere.
  std::ifstream aside(path_ + ".unusable");
  EXPECT_EQ(std::string(std::istreambuf_iterator<char>(aside), {}),
            "#!/bin/sh\necho not a store\n");
}

TEST_F(FileStoreTest, TellsAnotherProgramsDatabase) {
  MDB_env* env = nullptr;
  ASSERT_EQ(mdb_env_create(&env), 0);
  ASSERT_EQ(mdb_env_open(env, path_.c_str(), MDB_NOSUBDIR, 0600), 0);
  MDB_txn* txn = nullptr;
  ASSERT_EQ(mdb_txn_begin(env, nullptr, 0, &txn), 0);
  MDB_dbi dbi = 0;
  ASSERT_EQ(mdb_dbi_open(txn, nullptr, 0, &dbi), 0);
  MDB_val bytes = {3, const_cast<char*>("abc")};
  ASSERT_EQ(mdb_put(txn, dbi, &bytes, &bytes, 0), 0);
  ASSERT_EQ(mdb_txn_commit(txn), 0);
  mdb_env_close(env);
  Open();
  EXPECT_THAT(log_, ElementsAre(HasSubstr("is not of this format")));
}

// Another server may be about to write what tells the format.
TEST_F(FileStoreTest, TakesAFileThatIsBeingMade) {
  MDB_env* env = nullptr;
  ASSERT_EQ(mdb_env_create(&env), 0);
  ASSERT_EQ(mdb_env_open(env, path_.c_str(), MDB_NOSUBDIR, 0600), 0);
  const auto store = Open();
  store->Put({{"key", "value"}});
  EXPECT_EQ(store->Get("key"), "value");
  EXPECT_THAT(log_, IsEmpty());
  mdb_env_close(env);
}

TEST_F(FileStoreTest, TellsTornFiles) {
  constexpr int kBatches = 30;
  Fill(kBatches);
  const std::string whole = Read();
  std::mt19937_64 random(1);
  for (int i = 0; i < 20; ++i) {
    log_.clear();
    Write(whole.substr(0, 1 + random() % (whole.size() - 1)));
    const auto store = Open();
    EXPECT_THAT(log_, ElementsAre(HasSubstr("starting empty")));
    EXPECT_EQ(Found(*store, kBatches), 0);
    store->Put({{"key", "value"}});
    EXPECT_EQ(store->Get("key"), "value");
  }
}

TEST_F(FileStoreTest, NoDamageMakesAWrongValueOrTakesTheProcessDown) {
  constexpr int kBatches = 30;
  Fill(kBatches);
  const std::string whole = Read();
  std::mt19937_64 random(1);
  for (int i = 0; i < 30; ++i) {
    std::string damaged = whole;
    const size_t begin = random() % damaged.size();
    const size_t length =
        std::min<size_t>(1 + random() % 20'000, damaged.size() - begin);
    for (size_t k = begin; k < begin + length; ++k) {
      damaged[k] = static_cast<char>(random());
    }
    log_.clear();
    Write(damaged);
    const auto store = Open();
    Found(*store, kBatches);
  }
}

// What puts rely on and gets do not see: the size that the file says it has,
// and the list of its free pages.
TEST_F(FileStoreTest, DamageOfWhatPutsRelyOnIsTold) {
  constexpr int kBatches = 5;
  Fill(kBatches);
  Fill(kBatches);  // which leaves pages free
  const std::string whole = Read();
  // LMDB's first two pages: 16 bytes of header, 24 before the records of the
  // list's and the index's trees, 48 bytes each with the root at the end, then
  // the last page's number.
  constexpr size_t kPage = 4096;
  constexpr size_t kFreeRoot = 16 + 24 + 40;
  constexpr size_t kLastPage = 16 + 24 + 96;
  const auto word = [](const std::string& bytes, size_t at) {
    uint64_t value = 0;
    std::memcpy(&value, bytes.data() + at, sizeof(value));
    return value;
  };
  std::mt19937_64 random(1);
  for (int i = 0; i < 40; ++i) {
    std::string damaged = whole;
    for (const size_t meta : {size_t{0}, kPage}) {
      const uint64_t root = word(whole, meta + kFreeRoot);
      if (i % 4 == 0) {
        const uint64_t last = (uint64_t{1} << 40) + random() % 1000;
        std::memcpy(&damaged[meta + kLastPage], &last, sizeof(last));
      } else if (root < whole.size() / kPage) {
        // Its number, its flags, or its content.
        const size_t at = i % 4 == 1   ? random() % 8
                          : i % 4 == 2 ? 10
                                       : 16 + random() % (kPage - 32);
        for (size_t k = 0; k < (i % 4 == 3 ? 16 : 1); ++k) {
          char& byte = damaged[root * kPage + at + k];
          byte = static_cast<char>(byte ^ (1 + random() % 255));
        }
      }
    }
    log_.clear();
    Write(damaged);
    const auto store = Open();
    if (i % 4 != 3) {
      EXPECT_THAT(log_, ElementsAre(HasSubstr("starting empty"))) << i;
    }
    for (int k = 0; k < kNumberedBatch; ++k) {
      store->Put({NumberedEntry(0, 1000, k)});
    }
    Found(*store, kBatches);
  }
}

TEST_F(FileStoreTest, StaysWithinItsBytesAndSaysWhenItIsEmptied) {
  constexpr int64_t kFewBytes = 16 << 20;
  const auto store = Open(kFewBytes);
  int batch = 0;
  while (log_.empty() && batch < 4000) {
    std::vector<StoreEntry> entries;
    entries.reserve(kNumberedBatch);
    for (int i = 0; i < kNumberedBatch; ++i) {
      entries.push_back(NumberedEntry(0, batch, i));
    }
    store->Put(entries);
    ++batch;
  }
  EXPECT_THAT(log_, ElementsAre(HasSubstr("is full: emptied")));
  EXPECT_EQ(Found(*store, batch), kNumberedBatch);  // what came after
  struct stat file;
  ASSERT_EQ(stat(path_.c_str(), &file), 0);
  EXPECT_LE(file.st_size, kFewBytes);
}

TEST_F(FileStoreTest, IsEmptiedWhereItIsLargerThanItsLimit) {
  constexpr int64_t kFewBytes = 16 << 20;
  std::vector<StoreEntry> large;
  for (int i = 0; i < 30; ++i) {
    large.push_back({absl::StrCat("large", i), std::string(1 << 20, 'x')});
  }
  Open(2 * kFewBytes)->Put(large);
  const auto store = Open(kFewBytes);
  EXPECT_EQ(store->Get("large0"), large[0].value);
  for (int i = 0; i < 3; ++i) {
    const std::string key = absl::StrCat("key", i);
    store->Put({{key, "value"}});
    EXPECT_EQ(store->Get(key), "value");
  }
  EXPECT_EQ(store->Get("large0"), std::nullopt);
  EXPECT_THAT(log_, ElementsAre(HasSubstr("is full: emptied")));
}

TEST_F(FileStoreTest, SaysThatAnotherMadeItLargerThanItsLimit) {
  constexpr int64_t kFewBytes = 16 << 20;
  const auto small = Open(kFewBytes);
  const auto other =
      FileStore::Open(path_, 4 * kFewBytes, [](absl::string_view) {});
  ASSERT_TRUE(other.ok()) << other.status();
  for (int i = 0; i < 20; ++i) {
    (*other)->Put({{absl::StrCat("large", i), std::string(1 << 20, 'x')}});
  }
  for (int i = 0; i < 3; ++i) small->Put({{"key", "value"}});
  EXPECT_THAT(log_, ElementsAre(HasSubstr("takes no new costs: ")));
}

TEST_F(FileStoreTest, NamesAPathThatCannotBe) {
  const auto log = [](absl::string_view) {};
  const auto directory = FileStore::Open(::testing::TempDir(), kMaxBytes, log);
  EXPECT_EQ(directory.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(directory.status().message()),
              HasSubstr("is not a regular file"));
  const auto nowhere =
      FileStore::Open("/nonexistent/directory/store", kMaxBytes, log);
  EXPECT_EQ(nowhere.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(nowhere.status().message()),
              HasSubstr("'/nonexistent/directory/store'"));
}

}  // namespace
}  // namespace pipeweaver::semu
