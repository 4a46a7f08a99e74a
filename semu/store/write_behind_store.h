// Takes writes off the caller's way.

#ifndef SEMU_STORE_WRITE_BEHIND_STORE_H_
#define SEMU_STORE_WRITE_BEHIND_STORE_H_

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "semu/base/mutex.h"
#include "semu/store/subgraph_store.h"

namespace pipeweaver::semu {

// Gets go to the store behind at once, puts from a thread of its own, in
// batches; what waits is not found yet. Entries that find `max_pending` others
// waiting are dropped. Thread-safe.
class WriteBehindStore : public SubgraphStore {
 public:
  explicit WriteBehindStore(std::unique_ptr<SubgraphStore> store,
                            size_t max_pending = size_t{1} << 16);
  // Writes what waits.
  ~WriteBehindStore() override;

  absl::string_view name() const override { return store_->name(); }
  std::optional<std::string> Get(absl::string_view key) override {
    return store_->Get(key);
  }
  std::vector<std::optional<std::string>> GetAll(
      absl::Span<const absl::string_view> keys) override {
    return store_->GetAll(keys);
  }
  void Put(absl::Span<const StoreEntry> entries) override;

  // Waits until nothing is left to be written, at most until `deadline`.
  // Returns whether that is so.
  bool Flush(std::chrono::steady_clock::time_point deadline);

 private:
  void Write();

  const std::unique_ptr<SubgraphStore> store_;
  const size_t max_pending_;

  Mutex mutex_;
  CondVar changed_;
  std::vector<StoreEntry> pending_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ending_ ABSL_GUARDED_BY(mutex_) = false;

  std::thread writer_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_WRITE_BEHIND_STORE_H_
