#include "semu/store/file_store.h"

#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/store/record.h"

namespace pipeweaver::semu {
namespace {

// The header's name is of another length than any record's.
constexpr absl::string_view kHeaderName = "pipeweaver subgraph store";
constexpr absl::string_view kHeaderValue = "format 1";

constexpr unsigned kFlags = MDB_NOSUBDIR | MDB_NOTLS | MDB_NORDAHEAD;
constexpr mdb_mode_t kMode = 0600;
constexpr unsigned kMaxReaders = 1024;
// A file this full is emptied: emptying needs some room itself.
constexpr double kFullShare = 0.75;
// Entries of one transaction, far fewer than the room that is left then.
constexpr size_t kMaxBatch = 1024;
// Time to try a file. Damage may lead in circles.
constexpr unsigned kTrySeconds = 60;

MDB_val ValueOf(absl::string_view bytes) {
  return {bytes.size(), const_cast<char*>(bytes.data())};
}

absl::string_view BytesOf(const MDB_val& value) {
  return {static_cast<const char*>(value.mv_data), value.mv_size};
}

// Exit statuses of the child that tries a file.
enum Verdict : int { kUsable = 0, kDamaged = 1, kForeign = 2, kBusy = 3 };

// The pages in which names stand: each must be a leaf, say its own number, and
// have its free room where it has no entries. Gets do not look at that, but
// puts rely on it.
class LeafPages {
 public:
  explicit LeafPages(size_t page_bytes) : page_bytes_(page_bytes) {}

  bool Fits(const MDB_val& name) {
    const auto address = reinterpret_cast<uintptr_t>(name.mv_data);
    const uintptr_t page = address - address % page_bytes_;
    if (page == last_) return true;
    last_ = page;
    // LMDB's page: number, padding, flags, bounds of the free room, offsets of
    // the entries.
    constexpr uint16_t kLeaf = 2;
    constexpr size_t kHeaderBytes = 16;
    const auto* bytes = reinterpret_cast<const char*>(page);
    uint64_t number = 0;
    std::memcpy(&number, bytes, sizeof(number));
    if (number > page / page_bytes_) return false;
    const uintptr_t map = page - number * page_bytes_;
    if (map_ == 0) map_ = map;
    const auto short_at = [bytes](size_t at) {
      uint16_t value = 0;
      std::memcpy(&value, bytes + at, sizeof(value));
      return size_t{value};
    };
    const size_t lower = short_at(12);
    const size_t upper = short_at(14);
    if (short_at(10) != kLeaf || map != map_ || lower % 2 != 0 ||
        lower < kHeaderBytes || lower > upper || upper > page_bytes_) {
      return false;
    }
    for (size_t at = kHeaderBytes; at < lower; at += 2) {
      if (short_at(at) < upper || short_at(at) >= page_bytes_) return false;
    }
    return true;
  }

 private:
  const size_t page_bytes_;
  uintptr_t last_ = 0;
  uintptr_t map_ = 0;  // where the file begins, as the first page has it
};

// Reads every page of an index that a get may pass.
Verdict TryRecords(MDB_txn* txn, MDB_dbi dbi, LeafPages* pages) {
  MDB_stat stat;
  if (mdb_stat(txn, dbi, &stat) != 0) return kDamaged;
  // Another process is making it, or ended while it did.
  if (stat.ms_entries == 0) return kUsable;
  MDB_val name = ValueOf(kHeaderName);
  MDB_val value;
  if (mdb_get(txn, dbi, &name, &value) != 0 || BytesOf(value) != kHeaderValue) {
    return kForeign;
  }
  MDB_cursor* cursor = nullptr;
  if (mdb_cursor_open(txn, dbi, &cursor) != 0) return kDamaged;
  size_t entries = 0;
  int rc = 0;
  while ((rc = mdb_cursor_get(cursor, &name, &value, MDB_NEXT)) == 0) {
    if (++entries > stat.ms_entries || !pages->Fits(name)) return kDamaged;
    if (value.mv_size == 0) return kDamaged;
    const auto* bytes = static_cast<const volatile char*>(value.mv_data);
    (void)bytes[0];
    (void)bytes[value.mv_size - 1];
    if (BytesOf(name) != kHeaderName &&
        name.mv_size != static_cast<size_t>(kRecordNameBytes)) {
      return kForeign;
    }
  }
  return rc == MDB_NOTFOUND && entries == stat.ms_entries ? kUsable : kDamaged;
}

// Reads the list of pages that a put may take: each entry a transaction and
// pages of the file in descending order, no page twice. With those in use they
// must be all that the file has.
Verdict TryFreePages(MDB_txn* txn, MDB_dbi dbi, const MDB_envinfo& info,
                     LeafPages* leaves) {
  constexpr MDB_dbi kFreePages = 0;
  constexpr size_t kMetaPages = 2;
  MDB_stat used;
  MDB_stat list;
  if (mdb_stat(txn, dbi, &used) != 0 || mdb_stat(txn, kFreePages, &list) != 0) {
    return kDamaged;
  }
  MDB_cursor* cursor = nullptr;
  if (mdb_cursor_open(txn, kFreePages, &cursor) != 0) return kDamaged;
  std::vector<bool> is_free(info.me_last_pgno + 1, false);
  size_t pages = kMetaPages;
  for (const MDB_stat* stat : {&used, &list}) {
    pages +=
        stat->ms_branch_pages + stat->ms_leaf_pages + stat->ms_overflow_pages;
  }
  MDB_val name;
  MDB_val value;
  int rc = 0;
  while ((rc = mdb_cursor_get(cursor, &name, &value, MDB_NEXT)) == 0) {
    size_t count = 0;
    if (!leaves->Fits(name) || name.mv_size != sizeof(size_t) ||
        value.mv_size < sizeof(count)) {
      return kDamaged;
    }
    const auto* words = static_cast<const char*>(value.mv_data);
    std::memcpy(&count, words, sizeof(count));
    if (count != value.mv_size / sizeof(size_t) - 1) return kDamaged;
    size_t before = is_free.size();
    for (size_t i = 1; i <= count; ++i) {
      size_t page = 0;
      std::memcpy(&page, words + i * sizeof(page), sizeof(page));
      if (page < kMetaPages || page >= before || is_free[page]) return kDamaged;
      is_free[page] = true;
      before = page;
    }
    pages += count;
  }
  return rc == MDB_NOTFOUND && pages == is_free.size() ? kUsable : kDamaged;
}

// Whether this process can map so many bytes.
bool CanMap(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return false;
  munmap(memory, bytes);
  return true;
}

Verdict TryEnvironment(const std::string& path, int64_t max_bytes) {
  struct stat file;
  MDB_env* env = nullptr;
  if (::stat(path.c_str(), &file) != 0 || mdb_env_create(&env) != 0) {
    return kBusy;
  }
  mdb_env_set_mapsize(env, static_cast<size_t>(max_bytes));
  mdb_env_set_maxreaders(env, kMaxReaders);
  const int opened =
      mdb_env_open(env, path.c_str(), kFlags | MDB_RDONLY, kMode);
  if (opened == MDB_INVALID || opened == MDB_VERSION_MISMATCH ||
      opened == MDB_CORRUPTED) {
    return kForeign;
  }
  // A file that says it is larger than it is cannot be mapped, either.
  if ((opened == ENOMEM || opened == EINVAL) &&
      CanMap(static_cast<size_t>(std::max(max_bytes, int64_t{file.st_size})))) {
    return kDamaged;
  }
  if (opened != 0) return kBusy;
  MDB_envinfo info;
  MDB_stat stat;
  if (mdb_env_info(env, &info) != 0 || mdb_env_stat(env, &stat) != 0 ||
      ::stat(path.c_str(), &file) != 0 ||
      file.st_size / stat.ms_psize < static_cast<off_t>(info.me_last_pgno)) {
    return kDamaged;
  }
  MDB_txn* txn = nullptr;
  MDB_dbi dbi = 0;
  if (mdb_txn_begin(env, nullptr, MDB_RDONLY, &txn) != 0 ||
      mdb_dbi_open(txn, nullptr, 0, &dbi) != 0) {
    return kDamaged;
  }
  LeafPages pages(stat.ms_psize);
  if (const Verdict verdict = TryRecords(txn, dbi, &pages);
      verdict != kUsable) {
    return verdict;
  }
  // Of the same state as the transaction, unless another process has written
  // since.
  const size_t txn_id = mdb_txn_id(txn);
  if (mdb_env_info(env, &info) != 0) return kDamaged;
  const Verdict verdict = info.me_last_txnid == txn_id
                              ? TryFreePages(txn, dbi, info, &pages)
                              : kUsable;
  mdb_txn_abort(txn);
  mdb_env_close(env);
  return verdict;
}

// Tries the file in a child process: reading damaged pages may end it.
Verdict TryFile(const std::string& path, int64_t max_bytes) {
  const pid_t child = fork();
  if (child < 0) return kBusy;
  if (child == 0) {
    alarm(kTrySeconds);
    _exit(TryEnvironment(path, max_bytes));
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) return kBusy;
  }
  return WIFEXITED(status) ? static_cast<Verdict>(WEXITSTATUS(status))
                           : kDamaged;
}

absl::Status CannotOpen(absl::string_view path, absl::string_view reason) {
  return absl::FailedPreconditionError(
      absl::StrCat("'", path, "': cannot be opened as a store: ", reason));
}

}  // namespace

FileStore::FileStore(std::string path, int64_t max_bytes, Log log)
    : path_(std::move(path)), max_bytes_(max_bytes), log_(std::move(log)) {}

FileStore::~FileStore() {
  if (env_ != nullptr) mdb_env_close(env_);
}

absl::StatusOr<std::unique_ptr<FileStore>> FileStore::Open(
    const std::string& path, int64_t max_bytes, Log log) {
  struct stat file;
  const bool exists = ::stat(path.c_str(), &file) == 0;
  if (exists && !S_ISREG(file.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", path, "' is not a regular file"));
  }
  if (exists && access(path.c_str(), R_OK | W_OK) != 0) {
    return CannotOpen(path, std::strerror(errno));
  }
  if (exists && file.st_size > 0) {
    const Verdict verdict = TryFile(path, max_bytes);
    if (verdict == kDamaged || verdict == kForeign) {
      const std::string aside = absl::StrCat(path, ".unusable");
      if (rename(path.c_str(), aside.c_str()) != 0) {
        return CannotOpen(path, std::strerror(errno));
      }
      remove(absl::StrCat(path, "-lock").c_str());
      log(absl::StrCat(
          "subgraph store '", path, "' ",
          verdict == kDamaged ? "is damaged" : "is not of this format",
          ": moved to '", aside, "', starting empty"));
    }
  }
  std::unique_ptr<FileStore> store(
      new FileStore(path, max_bytes, std::move(log)));
  absl::Status status = store->OpenEnvironment();
  if (!status.ok()) return status;
  return store;
}

absl::Status FileStore::OpenEnvironment() {
  const auto failed = [this](int rc) {
    return CannotOpen(path_, mdb_strerror(rc));
  };
  if (int rc = mdb_env_create(&env_); rc != 0) return failed(rc);
  // A file larger than its limit needs room for the transaction that empties
  // it.
  struct stat file;
  const int64_t file_bytes =
      ::stat(path_.c_str(), &file) == 0 ? int64_t{file.st_size} : 0;
  mdb_env_set_mapsize(
      env_, static_cast<size_t>(max_bytes_ +
                                (file_bytes > max_bytes_ ? file_bytes : 0)));
  mdb_env_set_maxreaders(env_, kMaxReaders);
  if (int rc = mdb_env_open(env_, path_.c_str(), kFlags, kMode); rc != 0) {
    return failed(rc);
  }
  // Readers that were killed hold on to old pages.
  int dead = 0;
  mdb_reader_check(env_, &dead);
  MDB_txn* txn = nullptr;
  if (int rc = mdb_txn_begin(env_, nullptr, 0, &txn); rc != 0) {
    return failed(rc);
  }
  int rc = mdb_dbi_open(txn, nullptr, 0, &dbi_);
  if (rc == 0) {
    MDB_val name = ValueOf(kHeaderName);
    MDB_val value = ValueOf(kHeaderValue);
    rc = mdb_put(txn, dbi_, &name, &value, MDB_NOOVERWRITE);
    if (rc == MDB_KEYEXIST) rc = 0;
  }
  if (rc != 0) {
    mdb_txn_abort(txn);
    return failed(rc);
  }
  rc = mdb_txn_commit(txn);
  return rc == 0 ? absl::OkStatus() : failed(rc);
}

std::optional<std::string> FileStore::Get(absl::string_view key) {
  return GetAll({key})[0];
}

std::vector<std::optional<std::string>> FileStore::GetAll(
    absl::Span<const absl::string_view> keys) {
  std::vector<std::optional<std::string>> values(keys.size());
  MDB_txn* txn = nullptr;
  if (mdb_txn_begin(env_, nullptr, MDB_RDONLY, &txn) != 0) return values;
  for (size_t i = 0; i < keys.size(); ++i) {
    const std::string record_name = RecordName(keys[i]);
    MDB_val name = ValueOf(record_name);
    MDB_val value;
    if (mdb_get(txn, dbi_, &name, &value) == 0) {
      values[i] = DecodeRecord(keys[i], BytesOf(value));
    }
  }
  mdb_txn_abort(txn);
  return values;
}

int FileStore::BeginWrite(MDB_txn** txn, bool* emptied) {
  if (int rc = mdb_txn_begin(env_, nullptr, 0, txn); rc != 0) return rc;
  MDB_stat stat;
  if (int rc = mdb_stat(*txn, dbi_, &stat); rc != 0) return rc;
  const double used =
      static_cast<double>(stat.ms_psize) *
      static_cast<double>(stat.ms_branch_pages + stat.ms_leaf_pages +
                          stat.ms_overflow_pages);
  if (used < kFullShare * static_cast<double>(max_bytes_)) return 0;
  *emptied = true;
  if (int rc = mdb_drop(*txn, dbi_, 0); rc != 0) return rc;
  MDB_val name = ValueOf(kHeaderName);
  MDB_val value = ValueOf(kHeaderValue);
  return mdb_put(*txn, dbi_, &name, &value, 0);
}

void FileStore::Put(absl::Span<const StoreEntry> entries) {
  while (!entries.empty()) {
    PutBatch(entries.subspan(0, kMaxBatch));
    entries.remove_prefix(std::min(kMaxBatch, entries.size()));
  }
}

void FileStore::PutBatch(absl::Span<const StoreEntry> entries) {
  MDB_txn* txn = nullptr;
  bool emptied = false;
  int rc = BeginWrite(&txn, &emptied);
  for (const StoreEntry& entry : entries) {
    if (rc != 0) break;
    const std::string record_name = RecordName(entry.key);
    const std::string record = EncodeRecord(entry.key, entry.value);
    MDB_val name = ValueOf(record_name);
    MDB_val value = ValueOf(record);
    rc = mdb_put(txn, dbi_, &name, &value, 0);
  }
  if (rc == 0) {
    rc = mdb_txn_commit(txn);
  } else if (txn != nullptr) {
    mdb_txn_abort(txn);
  }
  if (rc == 0 && emptied) {
    log_(absl::StrCat("subgraph store '", path_, "' is full: emptied"));
  }
  // Another server that shares the file has made it larger than this one can
  // map, say.
  if (const bool writes = rc == 0; writes_.exchange(writes) != writes) {
    log_(absl::StrCat("subgraph store '", path_, "' ",
                      writes ? "takes new costs again" : "takes no new costs: ",
                      writes ? "" : mdb_strerror(rc)));
  }
}

}  // namespace pipeweaver::semu
