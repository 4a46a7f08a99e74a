// The Prometheus page: what is measured, under which names.
//
// Labels are bounded: version, method, code, origin, strategy; `job` only on
// the gauges pipeweaver_job_*, for at most max_job_labels jobs, and gone with
// the job.

#ifndef SERVER_METRICS_H_
#define SERVER_METRICS_H_

#include <prometheus/collectable.h>
#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>

#include <array>
#include <atomic>
#include <chrono>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "semu/base/mutex.h"
#include "server/planner_observer.h"

namespace pipeweaver::server {

// The rpcs of PlannerService, for labels.
enum class RpcMethod {
  kRegisterJob,
  kConfirmLayout,
  kDescribeJob,
  kListJobs,
  kRemoveJob,
  kSubmitStep,
  kCancelStep,
  kGetPlan,
  kGetProgram,
  kReportStep,
  kCompareStrategies,
  kSimulatePlan,
  kUploadProfile,
};
constexpr int kNumRpcMethods = 13;

// Thread-safe.
class Metrics final : public PlannerObserver, public prometheus::Collectable {
 public:
  // Values that are looked up at each scrape.
  struct Levels {
    int jobs = 0;
    int queue_length = 0;
    int searches_running = 0;
    int steps_held = 0;
    int64_t plan_bytes = 0;
    int registrations_waiting = 0;
    int registrations_running = 0;
    int questions_waiting = 0;
    int questions_running = 0;
  };

  explicit Metrics(int max_job_labels);

  // `levels` and `job_steps_held` are called at each scrape, until they are set
  // again; set nullptr before what they look at goes away.
  void SetSources(std::function<Levels()> levels,
                  std::function<int(const std::string&)> job_steps_held);

  void BeginRpc() { ++rpcs_in_flight_; }
  // A call has ended; its time includes waiting for a plan.
  void CountRpc(RpcMethod method, absl::StatusCode code,
                std::chrono::nanoseconds time);

  // These two, OnStepFailed and OnPlanGaveWay also say so in the log.
  void OnJobRegistered(const std::string& job, uint64_t attempt) override;
  void OnJobRemoved(const std::string& job, bool unused) override;
  void OnLikeBatchLookup(bool found) override;
  void OnPlanSealed(const SealedPlan& sealed,
                    const PlanTimings& timings) override;
  void OnStepFailed(const StepKey& key, const absl::Status& status) override;
  void OnPlanGaveWay(const StepKey& key) override;
  void OnReport(const std::string& job, double ratio) override;
  void OnCosts(const std::string& job, const CostVersion& version,
               bool is_new) override;
  void OnCostsRefused(const std::string& job,
                      const absl::Status& status) override;
  // Also says so in the log when a replica's drift begins and when it ends.
  void OnDrift(const StepKey& key, const JobCosts::DriftState& state) override;

  int rpcs_in_flight() const { return rpcs_in_flight_; }

  std::vector<prometheus::MetricFamily> Collect() const override;

 private:
  struct JobGauges {
    prometheus::Gauge* steps_held;
    prometheus::Gauge* predicted_seconds;
    prometheus::Gauge* gap;
    prometheus::Gauge* measured_over_predicted;
    prometheus::Gauge* measured_share;
    prometheus::Gauge* cost_version;
    prometheus::Gauge* measured_layers;
    prometheus::Gauge* error_before;
    prometheus::Gauge* error_after;
    prometheus::Gauge* extra_reserve_bytes;
    prometheus::Gauge* drift;
  };

  const size_t max_job_labels_;
  prometheus::Registry registry_;

  std::array<prometheus::Histogram*, kNumRpcMethods> rpc_seconds_;
  std::atomic<int> rpcs_in_flight_ = 0;
  prometheus::Gauge* rpcs_in_flight_gauge_;
  // [method][code]; the family creates each one when it is first counted.
  static constexpr int kNumCodes = 17;
  std::array<std::array<std::atomic<prometheus::Counter*>, kNumCodes>,
             kNumRpcMethods>
      rpc_counters_ = {};
  prometheus::Family<prometheus::Counter>& rpcs_;
  prometheus::Family<prometheus::Counter>& plans_sealed_;
  prometheus::Family<prometheus::Counter>& steps_failed_;
  std::array<prometheus::Histogram*, kNumPlanOrigins> planning_seconds_;
  prometheus::Histogram* queue_seconds_;
  prometheus::Family<prometheus::Histogram>& search_seconds_;
  prometheus::Histogram* check_seconds_;
  prometheus::Histogram* lower_seconds_;
  prometheus::Histogram* gap_;
  prometheus::Histogram* predicted_seconds_;
  prometheus::Histogram* measured_over_predicted_;
  prometheus::Counter* plans_gave_way_;
  prometheus::Counter* cost_versions_;
  prometheus::Counter* cost_versions_refused_;
  prometheus::Counter* drifted_steps_;
  prometheus::Counter* like_lookups_;
  prometheus::Counter* like_hits_;
  prometheus::Gauge* jobs_;
  prometheus::Gauge* queue_length_;
  prometheus::Gauge* searches_running_;
  prometheus::Gauge* registrations_waiting_;
  prometheus::Gauge* registrations_running_;
  prometheus::Gauge* questions_waiting_;
  prometheus::Gauge* questions_running_;
  prometheus::Gauge* steps_held_;
  prometheus::Gauge* plan_bytes_;
  prometheus::Family<prometheus::Gauge>& job_steps_held_;
  prometheus::Family<prometheus::Gauge>& job_predicted_seconds_;
  prometheus::Family<prometheus::Gauge>& job_gap_;
  prometheus::Family<prometheus::Gauge>& job_measured_over_predicted_;
  prometheus::Family<prometheus::Gauge>& job_measured_share_;
  prometheus::Family<prometheus::Gauge>& job_cost_version_;
  prometheus::Family<prometheus::Gauge>& job_measured_layers_;
  prometheus::Family<prometheus::Gauge>& job_error_before_;
  prometheus::Family<prometheus::Gauge>& job_error_after_;
  prometheus::Family<prometheus::Gauge>& job_extra_reserve_bytes_;
  prometheus::Family<prometheus::Gauge>& job_drift_;

  mutable Mutex mutex_;
  std::function<Levels()> levels_ ABSL_GUARDED_BY(mutex_);
  std::function<int(const std::string&)> job_held_ ABSL_GUARDED_BY(mutex_);
  std::map<std::string, JobGauges> job_gauges_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pipeweaver::server

#endif  // SERVER_METRICS_H_
