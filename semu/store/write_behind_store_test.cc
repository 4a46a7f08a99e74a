#include "semu/store/write_behind_store.h"

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

// Writes when it is let.
class HeldStore : public SubgraphStore {
 public:
  HeldStore(Mutex* mutex, std::vector<StoreEntry>* written)
      : mutex_(mutex), written_(written) {}
  absl::string_view name() const override { return "held"; }
  std::optional<std::string> Get(absl::string_view) override {
    return std::nullopt;
  }
  void Put(absl::Span<const StoreEntry> entries) override {
    MutexLock lock(mutex_);
    written_->insert(written_->end(), entries.begin(), entries.end());
  }

 private:
  Mutex* const mutex_;
  std::vector<StoreEntry>* const written_;
};

TEST(WriteBehindStoreTest, AFlushWaitsForWhatIsLeftUpToItsDeadline) {
  using std::chrono::steady_clock;
  Mutex mutex;
  std::vector<StoreEntry> written;
  WriteBehindStore store(std::make_unique<HeldStore>(&mutex, &written));
  EXPECT_TRUE(store.Flush(steady_clock::time_point()));
  {
    MutexLock lock(&mutex);
    store.Put({{"one", "1"}});
    store.Put({{"two", "2"}});
    EXPECT_FALSE(store.Flush(steady_clock::now()));
  }
  EXPECT_TRUE(store.Flush(steady_clock::now() + std::chrono::minutes(1)));
  EXPECT_EQ(written.size(), 2u);
}

}  // namespace
}  // namespace pipeweaver::semu
