// A writer is killed at random moments, 100 times: the store opens, what was
// acknowledged is there, and no wrong value is ever returned.

#include <signal.h>
#include <stdio.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "semu/store/file_store.h"
#include "semu/store/testing/numbered_entries.h"

namespace pipeweaver::semu {
namespace {

constexpr int kRounds = 100;

std::string& WriterPath() {
  static std::string path;
  return path;
}

// Runs the writer, kills it some time after it has acknowledged `batches`
// batches, and returns the last one acknowledged, or -1.
int64_t WriteAndKill(const std::string& path, int round, int batches,
                     std::chrono::microseconds longer) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    close(ends[0]);
    close(ends[1]);
    execl(WriterPath().c_str(), WriterPath().c_str(), path.c_str(),
          std::to_string(round).c_str(), nullptr);
    _exit(2);
  }
  close(ends[1]);
  FILE* acknowledged = fdopen(ends[0], "r");
  int64_t last = -1;
  char line[64];
  while (last + 1 < batches && fgets(line, sizeof line, acknowledged)) {
    last = std::atoll(line);
  }
  // The moment is to fall anywhere in what the writer does.
  std::this_thread::sleep_for(longer);
  kill(child, SIGKILL);
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFSIGNALED(status)) << "the writer ended by itself: " << status;
  while (fgets(line, sizeof line, acknowledged)) {
    if (std::string(line).back() == '\n') last = std::atoll(line);
  }
  fclose(acknowledged);
  return last;
}

TEST(FileStoreKillTest, SurvivesKillsAtRandomMoments) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/store.",
                                        static_cast<int64_t>(getpid()));
  std::mt19937_64 random(1);
  std::vector<int64_t> last;  // [round]
  int64_t found = 0;
  int64_t unacknowledged = 0;
  for (int round = 0; round < kRounds; ++round) {
    last.push_back(WriteAndKill(path, round, static_cast<int>(random() % 12),
                                std::chrono::microseconds(random() % 5000)));
    auto store = FileStore::Open(
        path, 256 << 20, [](absl::string_view line) { ADD_FAILURE() << line; });
    ASSERT_TRUE(store.ok()) << store.status();
    const auto check = [&](int64_t r, int64_t batch) {
      for (int i = 0; i < kNumberedBatch; ++i) {
        const StoreEntry expected = NumberedEntry(r, batch, i);
        const auto value = (*store)->Get(expected.key);
        if (batch <= last[r]) {
          ASSERT_TRUE(value.has_value()) << expected.key;
          ++found;
        }
        if (value) {
          ASSERT_EQ(*value, expected.value);
          if (batch > last[r]) ++unacknowledged;
        }
      }
    };
    // All of this round, one beyond what was acknowledged, some of before.
    for (int64_t batch = 0; batch <= last[round] + 1; ++batch) {
      check(round, batch);
    }
    for (int i = 0; i < 5; ++i) {
      const auto r = static_cast<int64_t>(random() % last.size());
      check(r, static_cast<int64_t>(random() % (last[r] + 2)));
    }
  }
  EXPECT_GT(found, kRounds);
  const long long all = found + unacknowledged;
  std::printf("%lld entries found, %lld of them never acknowledged\n", all,
              static_cast<long long>(unacknowledged));
}

}  // namespace
}  // namespace pipeweaver::semu

int main(int argc, char** argv) {
  ::testing::InitGoogleTest(&argc, argv);
  if (argc != 2) return 2;
  pipeweaver::semu::WriterPath() = argv[1];
  return RUN_ALL_TESTS();
}
