#include "server/planning_pool.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "semu/base/mutex.h"

namespace pipeweaver::server {
namespace {

// Keeps the pool's only worker busy until Open, and collects what ran.
class PoolFixture : public ::testing::Test {
 protected:
  PoolFixture() : pool_(1, 100) {
    ReservePlace();
    PlanningPool::Task gate;
    gate.job = "gate";
    gate.cancelled = std::make_shared<std::atomic<bool>>(false);
    gate.run = [this](bool) {
      MutexLock lock(&mutex_);
      while (!open_) changed_.Wait(&mutex_);
    };
    pool_.Enqueue(std::move(gate));
    while (pool_.load().running == 0) std::this_thread::yield();
  }

  void ReservePlace() { ASSERT_TRUE(pool_.Reserve()); }

  CancelFlag Add(const std::string& job, const std::string& name,
                 Clock::TimePoint needed_at = Clock::TimePoint::max()) {
    ReservePlace();
    PlanningPool::Task task;
    task.job = job;
    task.needed_at = needed_at;
    task.cancelled = std::make_shared<std::atomic<bool>>(false);
    task.run = [this, name](bool dropped) {
      MutexLock lock(&mutex_);
      ran_.push_back(dropped ? name + " dropped" : name);
      changed_.NotifyAll();
    };
    const CancelFlag cancelled = task.cancelled;
    pool_.Enqueue(std::move(task));
    return cancelled;
  }

  void Open() {
    MutexLock lock(&mutex_);
    open_ = true;
    changed_.NotifyAll();
  }

  std::vector<std::string> WaitFor(size_t count) {
    MutexLock lock(&mutex_);
    while (ran_.size() < count) changed_.Wait(&mutex_);
    return ran_;
  }

  Mutex mutex_;
  CondVar changed_;
  bool open_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::string> ran_ ABSL_GUARDED_BY(mutex_);
  PlanningPool pool_;
};

TEST_F(PoolFixture, TakesTurnsBetweenJobs) {
  for (int i = 0; i < 3; ++i) Add("a", "a" + std::to_string(i));
  Add("b", "b0");
  Add("c", "c0");
  Open();
  EXPECT_EQ(WaitFor(5),
            (std::vector<std::string>{"a0", "b0", "c0", "a1", "a2"}));
}

TEST_F(PoolFixture, OfOneJobTheEarliestNeededComesFirst) {
  const Clock::TimePoint now{};
  Add("a", "whenever");
  Add("a", "late", now + std::chrono::seconds(9));
  Add("a", "soon", now + std::chrono::seconds(1));
  Open();
  EXPECT_EQ(WaitFor(3), (std::vector<std::string>{"soon", "late", "whenever"}));
}

TEST_F(PoolFixture, DropsWhatIsCancelledWhileItWaits) {
  const CancelFlag first = Add("a", "first");
  Add("a", "second");
  const CancelFlag other = Add("b", "other");
  first->store(true);
  other->store(true);
  pool_.DropCancelled();
  EXPECT_EQ(WaitFor(2),
            (std::vector<std::string>{"first dropped", "other dropped"}));
  EXPECT_EQ(pool_.load().queued, 1);
  Open();
  EXPECT_EQ(WaitFor(3).back(), "second");
}

TEST_F(PoolFixture, StopDropsWhatWaits) {
  Add("a", "first");
  Open();
  WaitFor(1);
  pool_.Stop();
  EXPECT_FALSE(pool_.Reserve());
}

TEST(PlanningPoolTest, AJobLeavesThreadsToOthers) {
  PlanningPool pool(/*threads=*/2, /*max_queued=*/10, /*max_running_of_job=*/1);
  Mutex mutex;
  CondVar changed;
  bool open = false;
  int ran_heavy = 0, ran_light = 0;
  const auto add = [&](const std::string& job, std::function<void(bool)> run) {
    ASSERT_TRUE(pool.Reserve());
    PlanningPool::Task task;
    task.job = job;
    task.cancelled = std::make_shared<std::atomic<bool>>(false);
    task.run = std::move(run);
    pool.Enqueue(std::move(task));
  };
  for (int i = 0; i < 3; ++i) {
    add("heavy", [&](bool) {
      MutexLock lock(&mutex);
      while (!open) changed.Wait(&mutex);
      ++ran_heavy;
      changed.NotifyAll();
    });
  }
  for (int i = 0; i < 3; ++i) {
    add("light", [&](bool) {
      MutexLock lock(&mutex);
      ++ran_light;
      changed.NotifyAll();
    });
  }
  MutexLock lock(&mutex);
  while (ran_light < 3) changed.Wait(&mutex);
  EXPECT_EQ(ran_heavy, 0);
  open = true;
  changed.NotifyAll();
  while (ran_heavy < 3) changed.Wait(&mutex);
}

TEST(PlanningPoolTest, RefusesMoreThanItsBound) {
  PlanningPool pool(1, 3);
  EXPECT_TRUE(pool.Reserve(2));
  EXPECT_FALSE(pool.Reserve(2));
  EXPECT_TRUE(pool.Reserve());
  EXPECT_FALSE(pool.Reserve());
  pool.Release();
  EXPECT_TRUE(pool.Reserve());
}

TEST(PlanningPoolTest, AnswersATaskThatComesAfterStop) {
  PlanningPool pool(2, 3);
  ASSERT_TRUE(pool.Reserve());
  pool.Stop();
  bool dropped = false;
  PlanningPool::Task task;
  task.cancelled = std::make_shared<std::atomic<bool>>(false);
  task.run = [&dropped](bool was_dropped) { dropped = was_dropped; };
  pool.Enqueue(std::move(task));
  EXPECT_TRUE(dropped);
}

TEST(PlanningPoolTest, ManyThreadsRunEachTaskOnce) {
  std::atomic<int> ran = 0;
  constexpr int kTasks = 400;
  {
    PlanningPool pool(4, kTasks);
    std::vector<std::thread> submitters;
    submitters.reserve(4);
    for (int t = 0; t < 4; ++t) {
      submitters.emplace_back([&pool, &ran, t] {
        for (int i = 0; i < kTasks / 4; ++i) {
          ASSERT_TRUE(pool.Reserve());
          PlanningPool::Task task;
          task.job = std::to_string((i + t) % 3);
          task.cancelled = std::make_shared<std::atomic<bool>>(i % 7 == 0);
          task.run = [&ran](bool) { ++ran; };
          pool.Enqueue(std::move(task));
          if (i % 10 == 0) pool.DropCancelled();
        }
      });
    }
    for (std::thread& thread : submitters) thread.join();
  }
  EXPECT_EQ(ran, kTasks);
}

}  // namespace
}  // namespace pipeweaver::server
