#include "semu/store/write_behind_store.h"

#include <utility>

namespace pipeweaver::semu {

WriteBehindStore::WriteBehindStore(std::unique_ptr<SubgraphStore> store,
                                   size_t max_pending)
    : store_(std::move(store)),
      max_pending_(max_pending),
      writer_([this] { Write(); }) {}

WriteBehindStore::~WriteBehindStore() {
  {
    MutexLock lock(&mutex_);
    ending_ = true;
  }
  changed_.NotifyAll();
  writer_.join();
}

void WriteBehindStore::Put(absl::Span<const StoreEntry> entries) {
  {
    MutexLock lock(&mutex_);
    for (const StoreEntry& entry : entries) {
      if (pending_.size() >= max_pending_) break;
      pending_.push_back(entry);
    }
  }
  changed_.NotifyAll();
}

bool WriteBehindStore::Flush(std::chrono::steady_clock::time_point deadline) {
  MutexLock lock(&mutex_);
  while (!pending_.empty() || writing_) {
    if (changed_.WaitUntil(&mutex_, deadline)) break;
  }
  return pending_.empty() && !writing_;
}

void WriteBehindStore::Write() {
  while (true) {
    std::vector<StoreEntry> batch;
    {
      MutexLock lock(&mutex_);
      while (pending_.empty() && !ending_) changed_.Wait(&mutex_);
      if (pending_.empty()) return;
      batch.swap(pending_);
      writing_ = true;
    }
    store_->Put(batch);
    {
      MutexLock lock(&mutex_);
      writing_ = false;
    }
    changed_.NotifyAll();
  }
}

}  // namespace pipeweaver::semu
