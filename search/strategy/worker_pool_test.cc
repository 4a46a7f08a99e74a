#include "search/strategy/worker_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

namespace pipeweaver::search {
namespace {

TEST(WorkerPoolTest, RunsEveryJobOnceAndWaitsForAll) {
  for (const int threads : {1, 2, 5}) {
    WorkerPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const int jobs : {0, 1, 3, 100}) {
      std::vector<int> runs(jobs, 0);
      std::atomic<int> bad_workers = 0;
      pool.Run(jobs, [&](int worker, int index) {
        if (worker < 0 || worker >= threads) ++bad_workers;
        ++runs[index];
      });
      EXPECT_EQ(runs, std::vector<int>(jobs, 1));
      EXPECT_EQ(bad_workers, 0);
    }
  }
}

TEST(WorkerPoolTest, AWorkerRunsOneJobAtATime) {
  WorkerPool pool(3);
  std::vector<std::atomic<int>> running(3);
  std::atomic<bool> overlap = false;
  pool.Run(300, [&](int worker, int) {
    if (++running[worker] > 1) overlap = true;
    --running[worker];
  });
  EXPECT_FALSE(overlap);
}

}  // namespace
}  // namespace pipeweaver::search
