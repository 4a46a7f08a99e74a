// What costing a step takes with and without reuse. Run: tests/bench.sh store
//
// "Step": every layer cost that a vlm-l step of 64 microbatches asks for,
// together as the planner does; counters say how many, and how many operations
// were really simulated for them.

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "benchmark/benchmark.h"
#include "search/partition/layout_planner.h"
#include "search/partition/memory_plan.h"
#include "search/partition/step_problem_builder.h"
#include "semu/base/check.h"
#include "semu/base/mutex.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"
#include "semu/store/file_store.h"
#include "semu/store/memory_store.h"
#include "semu/store/redis_store.h"
#include "semu/store/write_behind_store.h"

namespace pipeweaver {
namespace {

using Levels = std::vector<std::unique_ptr<semu::SubgraphStore>>;

// Notes what it is asked.
class RecordingCost : public semu::CostModel {
 public:
  semu::LayerCost Cost(const semu::Platform& platform,
                       const semu::LayerQuery& query) const override {
    MutexLock lock(&mutex_);
    queries_.push_back(query);
    return base_.Cost(platform, query);
  }
  std::string Fingerprint() const override { return base_.Fingerprint(); }
  std::vector<semu::LayerQuery> queries() const {
    MutexLock lock(&mutex_);
    return queries_;
  }

 private:
  const semu::OpGraphCost base_;
  mutable Mutex mutex_;
  mutable std::vector<semu::LayerQuery> queries_ ABSL_GUARDED_BY(mutex_);
};

struct Step {
  semu::Platform platform;
  std::vector<semu::LayerQuery> queries;
};

const Step& VlmLStep() {
  static const Step& step = *[] {
    auto* made = new Step;
    const v1::Job proto = *semu::MakeSetup("vlm-l");
    const semu::Job job = *semu::JobFromProto(proto);
    const semu::Batch batch = *semu::BatchFromProto(
        *semu::SampleBatch(proto, {.seed = 1, .microbatches = 64}), job);
    const semu::OpGraphCost costs;
    const semu::Layout layout = *search::PlanLayout(job, costs);
    const search::MemoryPlan memory = *search::PlanMemory(job, layout, costs);
    const RecordingCost recorder;
    PW_CHECK(search::BuildStepProblem(
                 job, layout, memory.activation_limit_bytes, batch, recorder)
                 .ok());
    made->platform = semu::PlatformOf(job);
    made->queries = recorder.queries();
    return made;
  }();
  return step;
}

std::shared_ptr<semu::SubgraphCache> CacheOf(
    std::unique_ptr<semu::SubgraphStore> slow) {
  Levels levels;
  levels.push_back(std::make_unique<semu::MemoryStore>(64 << 20));
  if (slow != nullptr) levels.push_back(std::move(slow));
  return std::make_shared<semu::SubgraphCache>(std::move(levels));
}

std::unique_ptr<semu::OpGraphCost> CostsOver(
    std::shared_ptr<semu::SubgraphCache> cache) {
  return std::make_unique<semu::OpGraphCost>(
      std::make_shared<semu::DeviceOpTimes>(), std::move(cache));
}

void CostStep(const semu::CostModel& costs) {
  const Step& step = VlmLStep();
  benchmark::DoNotOptimize(costs.CostAll(step.platform, step.queries));
}

void SetCounters(benchmark::State& state, const semu::OpGraphCost& costs,
                 const semu::SubgraphCache* cache) {
  state.counters["queries"] = static_cast<double>(VlmLStep().queries.size());
  state.counters["ops"] = static_cast<double>(costs.ops_simulated());
  if (cache == nullptr) return;
  for (const auto& level : cache->counters().levels) {
    state.counters[level.name + "_hits"] = static_cast<double>(level.hits);
  }
}

void BM_StepWithoutReuse(benchmark::State& state) {
  VlmLStep();
  for (auto _ : state) {
    const semu::OpGraphCost costs;
    CostStep(costs);
    SetCounters(state, costs, nullptr);
  }
}
BENCHMARK(BM_StepWithoutReuse)->Unit(benchmark::kMillisecond);

void BM_StepCold(benchmark::State& state) {
  VlmLStep();
  for (auto _ : state) {
    const auto cache = CacheOf(nullptr);
    const auto costs = CostsOver(cache);
    CostStep(*costs);
    SetCounters(state, *costs, cache.get());
  }
}
BENCHMARK(BM_StepCold)->Unit(benchmark::kMillisecond);

void BM_StepWarm(benchmark::State& state) {
  const auto cache = CacheOf(nullptr);
  CostStep(*CostsOver(cache));
  const auto costs = CostsOver(cache);
  for (auto _ : state) CostStep(*costs);
  state.counters["queries_a_second"] =
      benchmark::Counter(static_cast<double>(VlmLStep().queries.size()),
                         benchmark::Counter::kIsIterationInvariantRate);
  state.counters["ops"] = static_cast<double>(costs->ops_simulated());
}
BENCHMARK(BM_StepWarm)->Unit(benchmark::kMillisecond);

// Files that no benchmark shares.
std::string NewPath(const char* name) {
  static int count = 0;
  return absl::StrCat("/tmp/pipeweaver_store_bench.",
                      static_cast<int64_t>(getpid()), ".", name, ++count);
}

std::unique_ptr<semu::SubgraphStore> OpenFile(const std::string& path) {
  return std::make_unique<semu::WriteBehindStore>(*semu::FileStore::Open(
      path, int64_t{1} << 30, [](absl::string_view line) {
        std::fprintf(stderr, "%s\n", std::string(line).c_str());
      }));
}

// A first server has costed the step; another one starts on its file.
void BM_StepRestarted(benchmark::State& state) {
  const std::string path = NewPath("file");
  CostStep(*CostsOver(CacheOf(OpenFile(path))));
  for (auto _ : state) {
    state.PauseTiming();
    auto cache = CacheOf(OpenFile(path));
    auto costs = CostsOver(cache);
    state.ResumeTiming();
    CostStep(*costs);
    state.PauseTiming();
    SetCounters(state, *costs, cache.get());
    costs.reset();
    cache.reset();
    state.ResumeTiming();
  }
  std::remove(path.c_str());
  std::remove((path + "-lock").c_str());
}
BENCHMARK(BM_StepRestarted)->Unit(benchmark::kMillisecond);

// Another server has costed the step; both share a Redis on this machine.
void BM_StepShared(benchmark::State& state) {
  const std::string path = NewPath("redis");
  const pid_t redis = fork();
  if (redis == 0) {
    if (std::freopen("/dev/null", "w", stdout) == nullptr) _exit(2);
    execlp("redis-server", "redis-server", "--port", "0", "--unixsocket",
           path.c_str(), "--save", "", "--appendonly", "no", nullptr);
    _exit(2);
  }
  while (access(path.c_str(), F_OK) != 0 &&
         waitpid(redis, nullptr, WNOHANG) == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  const auto open = [&path] {
    auto store =
        *semu::RedisStore::Create("unix:" + path, {}, [](absl::string_view) {});
    store->Ping();
    return store;
  };
  CostStep(*CostsOver(CacheOf(open())));
  for (auto _ : state) {
    const auto cache = CacheOf(open());
    const auto costs = CostsOver(cache);
    CostStep(*costs);
    SetCounters(state, *costs, cache.get());
  }
  kill(redis, SIGKILL);
  waitpid(redis, nullptr, 0);
  std::remove(path.c_str());
}
BENCHMARK(BM_StepShared)->Unit(benchmark::kMillisecond)->UseRealTime();

}  // namespace
}  // namespace pipeweaver
