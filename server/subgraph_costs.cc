#include "server/subgraph_costs.h"

#include <prometheus/client_metric.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "semu/base/status_macros.h"
#include "semu/store/file_store.h"
#include "semu/store/memory_store.h"
#include "semu/store/redis_store.h"

namespace pipeweaver::server {
namespace {

// A little more than Redis has to connect and to answer.
constexpr std::chrono::milliseconds kPingWait{100};

void Log(absl::string_view line) { spdlog::warn("{}", std::string(line)); }

prometheus::MetricFamily Counters(const char* name, const char* help) {
  prometheus::MetricFamily family;
  family.name = name;
  family.help = help;
  family.type = prometheus::MetricType::Counter;
  return family;
}

void Add(int64_t value, prometheus::MetricFamily* family,
         const std::string& level = "") {
  prometheus::ClientMetric metric;
  if (!level.empty()) metric.label.push_back({"level", level});
  metric.counter.value = static_cast<double>(value);
  family->metric.push_back(std::move(metric));
}

}  // namespace

SubgraphMetrics::SubgraphMetrics(
    std::shared_ptr<const semu::SubgraphCache> cache,
    std::shared_ptr<const semu::OpGraphCost> costs, semu::RedisStore* redis)
    : cache_(std::move(cache)), costs_(std::move(costs)), redis_(redis) {
  if (redis_ != nullptr) ping_ = Ping();
}

std::future<bool> SubgraphMetrics::Ping() const {
  return std::async(std::launch::async, [this] { return redis_->Ping(); });
}

bool SubgraphMetrics::RedisAnswers() const {
  MutexLock lock(&mutex_);
  if (!ping_.valid()) ping_ = Ping();
  if (ping_.wait_for(kPingWait) == std::future_status::ready) {
    redis_answers_ = ping_.get();
  }
  return redis_answers_;
}

std::vector<prometheus::MetricFamily> SubgraphMetrics::Collect() const {
  const semu::SubgraphCache::Counters counters = cache_->counters();
  prometheus::MetricFamily hits =
      Counters("pipeweaver_subgraph_hits_total",
               "Layer costs found in the subgraph store, by its levels.");
  for (const auto& level : counters.levels) Add(level.hits, &hits, level.name);
  prometheus::MetricFamily joined =
      Counters("pipeweaver_subgraph_joined_total",
               "Layer costs that another caller was already looking for.");
  Add(counters.joined, &joined);
  prometheus::MetricFamily misses =
      Counters("pipeweaver_subgraph_misses_total",
               "Layer costs that no level of the subgraph store had.");
  Add(counters.computed, &misses);
  prometheus::MetricFamily ops =
      Counters("pipeweaver_ops_simulated_total",
               "Operations of layers that were really simulated.");
  Add(costs_->ops_simulated(), &ops);
  std::vector<prometheus::MetricFamily> families = {hits, joined, misses, ops};
  if (redis_ != nullptr) {
    prometheus::MetricFamily& up = families.emplace_back();
    up.name = "pipeweaver_subgraph_redis_up";
    up.help =
        "1 where the subgraph store's Redis answers, asked anew by scrapes.";
    up.type = prometheus::MetricType::Gauge;
    up.metric.emplace_back().gauge.value = RedisAnswers() ? 1 : 0;
  }
  return families;
}

bool SubgraphCosts::Flush(std::chrono::milliseconds most) const {
  const auto deadline = std::chrono::steady_clock::now() + most;
  bool all = true;
  for (semu::WriteBehindStore* level : written_behind) {
    all = level->Flush(deadline) && all;
  }
  return all;
}

absl::StatusOr<SubgraphCosts> MakeSubgraphCosts(
    const v1::ServerConfig& config) {
  SubgraphCosts made;
  std::vector<std::unique_ptr<semu::SubgraphStore>> levels;
  const auto add_behind = [&](std::unique_ptr<semu::SubgraphStore> store) {
    auto level = std::make_unique<semu::WriteBehindStore>(std::move(store));
    made.written_behind.push_back(level.get());
    levels.push_back(std::move(level));
  };
  levels.push_back(
      std::make_unique<semu::MemoryStore>(config.subgraph_store_bytes()));
  if (!config.subgraph_store_file().empty()) {
    auto file = semu::FileStore::Open(config.subgraph_store_file(),
                                      config.subgraph_store_file_bytes(), Log);
    if (!file.ok()) {
      return absl::Status(
          file.status().code(),
          absl::StrCat("subgraph_store_file: ", file.status().message()));
    }
    add_behind(*std::move(file));
  }
  semu::RedisStore* shared = nullptr;
  if (!config.subgraph_store_redis().empty()) {
    PW_ASSIGN_OR_RETURN(
        auto redis,
        semu::RedisStore::Create(config.subgraph_store_redis(), {}, Log));
    shared = redis.get();
    add_behind(std::move(redis));
  }
  auto cache = std::make_shared<semu::SubgraphCache>(std::move(levels));
  made.costs = std::make_shared<semu::OpGraphCost>(
      std::make_shared<semu::DeviceOpTimes>(), cache);
  made.metrics = std::make_shared<SubgraphMetrics>(cache, made.costs, shared);
  return made;
}

}  // namespace pipeweaver::server
