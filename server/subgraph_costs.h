// The server's cost model with the store that its config asks for.

#ifndef SERVER_SUBGRAPH_COSTS_H_
#define SERVER_SUBGRAPH_COSTS_H_

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <chrono>
#include <future>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "pipeweaver/v1/server_config.pb.h"
#include "semu/base/mutex.h"
#include "semu/cost/op_graph_cost.h"
#include "semu/store/redis_store.h"
#include "semu/store/subgraph_cache.h"
#include "semu/store/write_behind_store.h"

namespace pipeweaver::server {

// Counters of reuse, and whether Redis is there, for the Prometheus page.
// Thread-safe.
class SubgraphMetrics : public prometheus::Collectable {
 public:
  // `redis`: the level of `cache` that it is, or null. It is asked at once, on
  // a thread of its own, so that it is connected when layers are looked for.
  SubgraphMetrics(std::shared_ptr<const semu::SubgraphCache> cache,
                  std::shared_ptr<const semu::OpGraphCost> costs,
                  semu::RedisStore* redis);

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  // Whether Redis answers, as far as is known in a short while: a name that is
  // not resolved must not keep the page.
  bool RedisAnswers() const ABSL_LOCKS_EXCLUDED(mutex_);

  std::future<bool> Ping() const;

  const std::shared_ptr<const semu::SubgraphCache> cache_;
  const std::shared_ptr<const semu::OpGraphCost> costs_;
  semu::RedisStore* const redis_;
  mutable Mutex mutex_;
  mutable std::future<bool> ping_ ABSL_GUARDED_BY(mutex_);
  mutable bool redis_answers_ ABSL_GUARDED_BY(mutex_) = false;
};

struct SubgraphCosts {
  std::shared_ptr<const semu::OpGraphCost> costs;
  std::shared_ptr<SubgraphMetrics> metrics;
  // Levels that are written to behind the callers, owned by `costs`.
  std::vector<semu::WriteBehindStore*> written_behind;

  // Waits until all is written, for at most `most`. Returns whether it is.
  bool Flush(std::chrono::milliseconds most) const;
};

// Op graph costs over the levels of a complete config: memory, file, Redis.
// Errors: INVALID_ARGUMENT or FAILED_PRECONDITION naming the field, for a file
// that cannot be opened or made. A Redis that is away is no error.
absl::StatusOr<SubgraphCosts> MakeSubgraphCosts(const v1::ServerConfig& config);

}  // namespace pipeweaver::server

#endif  // SERVER_SUBGRAPH_COSTS_H_
