// A store in a file that outlives the process.

#ifndef SEMU_STORE_FILE_STORE_H_
#define SEMU_STORE_FILE_STORE_H_

#include <lmdb.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "semu/store/subgraph_store.h"

namespace pipeweaver::semu {

// An LMDB environment of records (record.h) by name, and a header record. A put
// is on disk when it returns, and the file is whole after any kill. Several
// processes may share a file; one process must not open it twice. Thread-safe.
class FileStore : public SubgraphStore {
 public:
  using Log = std::function<void(absl::string_view)>;

  // Opens or makes the file, and `path`-lock beside it. A file that is torn,
  // damaged or no store of this format is moved to `path`.unusable, a new one
  // made, and one line logged; a child process tries the file, so that no
  // damage of its records, page numbers or free pages can take this process
  // down. A file that has come near `max_bytes` is
  // emptied, with one line.
  // Errors: INVALID_ARGUMENT for a path that is no file; FAILED_PRECONDITION
  // for one that cannot be opened or made, both naming path and reason.
  static absl::StatusOr<std::unique_ptr<FileStore>> Open(
      const std::string& path, int64_t max_bytes, Log log);

  ~FileStore() override;
  FileStore(const FileStore&) = delete;
  FileStore& operator=(const FileStore&) = delete;

  absl::string_view name() const override { return "file"; }
  std::optional<std::string> Get(absl::string_view key) override;
  std::vector<std::optional<std::string>> GetAll(
      absl::Span<const absl::string_view> keys) override;
  void Put(absl::Span<const StoreEntry> entries) override;

 private:
  FileStore(std::string path, int64_t max_bytes, Log log);

  absl::Status OpenEnvironment();
  void PutBatch(absl::Span<const StoreEntry> entries);
  // Begins the transaction that Put needs, the file emptied where it is full:
  // then sets `emptied`.
  int BeginWrite(MDB_txn** txn, bool* emptied);

  const std::string path_;
  const int64_t max_bytes_;
  const Log log_;
  MDB_env* env_ = nullptr;
  MDB_dbi dbi_ = 0;
  std::atomic<bool> writes_ = true;  // the last Put was stored
};

}  // namespace pipeweaver::semu

#endif  // SEMU_STORE_FILE_STORE_H_
