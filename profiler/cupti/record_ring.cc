// A bounded ring of fixed-size records in shared memory.

#include "profiler/cupti/record_ring.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <new>
#include <system_error>

namespace pipeweaver::cupti {
namespace {

// "PWCUPTI1" in memory.
constexpr uint64_t kMagic = 0x3149545055435750;

uint64_t Fnv1a(const std::string& text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text)
    hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  return hash;
}

}  // namespace

void CopyText(const std::string& text, char* field, std::size_t field_bytes) {
  const std::size_t room = field_bytes - 1;
  std::memset(field, 0, field_bytes);
  if (text.size() <= room) {
    std::memcpy(field, text.data(), text.size());
    return;
  }
  char suffix[18];
  std::snprintf(suffix, sizeof(suffix), "~%016llx",
                static_cast<unsigned long long>(Fnv1a(text)));
  std::memcpy(field, text.data(), room - 17);
  std::memcpy(field + room - 17, suffix, 17);
}

void RemoveLeftRings(const std::string& prefix) {
  const std::filesystem::path pattern(prefix);
  const std::string name = pattern.filename();
  std::error_code error;
  for (std::filesystem::directory_iterator entry(pattern.parent_path(), error),
       end;
       !error && entry != end; entry.increment(error)) {
    const std::string found = entry->path().filename();
    if (found.compare(0, name.size(), name) != 0) continue;
    const int file = open(entry->path().c_str(),
                          O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0) continue;
    if (flock(file, LOCK_EX | LOCK_NB) == 0) unlink(entry->path().c_str());
    close(file);
  }
}

bool RingWriter::Open(const std::string& path, uint64_t slots) {
  Close();
  int file = -1;
  struct stat info {};
  // Another process may take it for left behind before it is locked.
  while (info.st_nlink == 0) {
    if (file >= 0) close(file);
    unlink(path.c_str());
    file = open(path.c_str(),
                O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (file < 0) return false;
    flock(file, LOCK_EX);
    if (fstat(file, &info) != 0) break;
  }
  const std::size_t bytes = kRingHeaderBytes + slots * sizeof(AgentRecord);
  void* memory = MAP_FAILED;
  // Reserving the pages now: a full /dev/shm must fail here, not as SIGBUS in
  // the trainer.
  const int error = posix_fallocate(file, 0, static_cast<off_t>(bytes));
  if (error == 0) {
    memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  } else {
    errno = error;
  }
  const int saved = errno;
  if (memory == MAP_FAILED) {
    close(file);
    unlink(path.c_str());
    errno = saved;
    return false;
  }
  path_ = path;
  file_ = file;
  num_slots_ = slots;
  header_ = new (memory) RingHeader{};
  slots_ = reinterpret_cast<AgentRecord*>(static_cast<char*>(memory) +
                                          kRingHeaderBytes);
  header_->record_bytes = sizeof(AgentRecord);
  header_->slots = slots;
  header_->pid = static_cast<uint64_t>(getpid());
  // Last: with the magic a reader takes the rest for complete.
  header_->magic.store(kMagic, std::memory_order_release);
  return true;
}

void RingWriter::Write(const AgentRecord& record) {
  if (header_ == nullptr) return;
  const uint64_t written = header_->written.load(std::memory_order_relaxed);
  if (written - header_->read.load(std::memory_order_acquire) >= num_slots_) {
    header_->dropped.fetch_add(1, std::memory_order_relaxed);
    return;
  }
  slots_[written % num_slots_] = record;
  header_->written.store(written + 1, std::memory_order_release);
}

void RingWriter::Close() {
  if (header_ == nullptr) return;
  munmap(header_, kRingHeaderBytes + num_slots_ * sizeof(AgentRecord));
  unlink(path_.c_str());
  close(file_);
  header_ = nullptr;
  slots_ = nullptr;
}

RingReader::~RingReader() {
  if (header_ != nullptr) munmap(header_, mapped_bytes_);
}

bool RingReader::Open(const std::string& path, std::string* reason) {
  const int file = open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
  if (file < 0) {
    *reason = std::strerror(errno);
    return false;
  }
  struct stat info = {};
  void* memory = MAP_FAILED;
  if (fstat(file, &info) == 0 &&
      static_cast<std::size_t>(info.st_size) > kRingHeaderBytes) {
    memory = mmap(nullptr, static_cast<std::size_t>(info.st_size),
                  PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  }
  close(file);
  *reason = "is no ring of activity records";
  if (memory == MAP_FAILED) return false;
  auto* header = static_cast<RingHeader*>(memory);
  const auto bytes = static_cast<std::size_t>(info.st_size);
  const uint64_t slots = header->slots;
  if (header->magic.load(std::memory_order_acquire) != kMagic ||
      header->record_bytes != sizeof(AgentRecord) || slots == 0 ||
      slots != (bytes - kRingHeaderBytes) / sizeof(AgentRecord)) {
    munmap(memory, bytes);
    return false;
  }
  reason->clear();
  header_ = header;
  slots_ = reinterpret_cast<const AgentRecord*>(static_cast<char*>(memory) +
                                                kRingHeaderBytes);
  mapped_bytes_ = bytes;
  num_slots_ = slots;
  return true;
}

bool RingReader::Read(AgentRecord* record) {
  uint64_t read = header_->read.load(std::memory_order_relaxed);
  const uint64_t written = header_->written.load(std::memory_order_acquire);
  if (read == written) return false;
  if (written - read > num_slots_) read = written - num_slots_;
  *record = slots_[read % num_slots_];
  // The other process is not to be trusted with our string ends.
  record->annotation[sizeof(record->annotation) - 1] = '\0';
  record->name[sizeof(record->name) - 1] = '\0';
  header_->read.store(read + 1, std::memory_order_release);
  return true;
}

}  // namespace pipeweaver::cupti
