// Writes numbered entries to a store until it is killed, and reads at the same
// time: file_store_writer PATH ROUND. Prints each batch's number once it is
// written. Ends by itself only on a wrong value, with exit status 1.

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "semu/store/file_store.h"
#include "semu/store/testing/numbered_entries.h"

namespace pipeweaver::semu {
namespace {

int Run(const char* path, int64_t round) {
  auto store = FileStore::Open(path, 256 << 20, [](absl::string_view line) {
    std::fprintf(stderr, "%s\n", std::string(line).c_str());
    _exit(1);  // nothing was wrong with the file
  });
  if (!store.ok()) {
    std::fprintf(stderr, "%s\n", store.status().ToString().c_str());
    return 1;
  }
  std::atomic<int64_t> written = 0;
  std::thread reader([&] {
    for (int64_t i = 0;; ++i) {
      const StoreEntry expected =
          NumberedEntry(round, i % (written + 1), i % kNumberedBatch);
      const auto value = (*store)->Get(expected.key);
      if (value && *value != expected.value) _exit(1);
    }
  });
  for (int64_t batch = 0;; ++batch) {
    std::vector<StoreEntry> entries;
    entries.reserve(kNumberedBatch);
    for (int i = 0; i < kNumberedBatch; ++i) {
      entries.push_back(NumberedEntry(round, batch, i));
    }
    (*store)->Put(entries);
    written = batch;
    std::printf("%lld\n", static_cast<long long>(batch));
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace pipeweaver::semu

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  return pipeweaver::semu::Run(argv[1], std::atoll(argv[2]));
}
