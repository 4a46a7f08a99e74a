// Proof that ThreadSanitizer watches: the same counter with its lock taken on
// one thread only must be caught, and with both must not.

#include <cstdlib>
#include <thread>

#include "absl/base/config.h"
#include "absl/base/thread_annotations.h"
#include "gtest/gtest.h"
#include "semu/base/mutex.h"

namespace pipeweaver::server {
namespace {

#ifdef ABSL_HAVE_THREAD_SANITIZER

// Counts on two threads, then exits with 0.
[[noreturn]] void Count(bool both_locked) ABSL_NO_THREAD_SAFETY_ANALYSIS {
  Mutex mutex;
  volatile int count = 0;
  std::thread locked([&] {
    for (int i = 0; i < 1000; ++i) {
      MutexLock lock(&mutex);
      count = count + 1;
    }
  });
  for (int i = 0; i < 1000; ++i) {
    if (both_locked) mutex.Lock();
    count = count + 1;
    if (both_locked) mutex.Unlock();
  }
  locked.join();
  std::exit(0);
}

TEST(SeededRaceTest, IsCaught) {
  ::testing::FLAGS_gtest_death_test_style = "threadsafe";
  // The exit code of a process in which ThreadSanitizer found something.
  EXPECT_EXIT(Count(/*both_locked=*/false), ::testing::ExitedWithCode(66),
              "data race");
  EXPECT_EXIT(Count(/*both_locked=*/true), ::testing::ExitedWithCode(0), "");
}

#else

TEST(SeededRaceTest, IsCaught) {
  GTEST_SKIP() << "skipped: needs --config=tsan";
}

#endif

}  // namespace
}  // namespace pipeweaver::server
