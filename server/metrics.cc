// See metrics.h.

#include "server/metrics.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "semu/base/version.h"

namespace pipeweaver::server {
namespace {

using Buckets = prometheus::Histogram::BucketBoundaries;

constexpr const char* kMethodNames[kNumRpcMethods] = {
    "RegisterJob",  "ConfirmLayout", "DescribeJob",       "ListJobs",
    "RemoveJob",    "SubmitStep",    "CancelStep",        "GetPlan",
    "GetProgram",   "ReportStep",    "CompareStrategies", "SimulatePlan",
    "UploadProfile"};

constexpr const char* kOriginNames[kNumPlanOrigins] = {
    "unspecified", "search_finished", "search_cut", "cached", "safe"};

Buckets Exponential(double first, int count) {
  Buckets buckets;
  for (double bound = first; count > 0; --count, bound *= 2) {
    buckets.push_back(bound);
  }
  return buckets;
}

// 10 us .. 10 s.
Buckets Latency() { return Exponential(1e-5, 21); }
// 10 us .. 168 s: registrations look for a layout.
Buckets CallTime() { return Exponential(1e-5, 25); }
// 1 ms .. 17 min.
Buckets StepTime() { return Exponential(1e-3, 21); }
Buckets Gap() {
  return {0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1};
}
Buckets Ratio() {
  return {0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 1, 1.02, 1.05, 1.1, 1.2, 1.5, 2, 5};
}

prometheus::Family<prometheus::Counter>& Counters(
    prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}

prometheus::Family<prometheus::Gauge>& Gauges(prometheus::Registry& registry,
                                              const char* name,
                                              const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}

prometheus::Family<prometheus::Histogram>& Histograms(
    prometheus::Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}

double Seconds(int64_t nanoseconds) {
  return static_cast<double>(nanoseconds) * 1e-9;
}

}  // namespace

Metrics::Metrics(int max_job_labels)
    : max_job_labels_(max_job_labels),
      rpcs_in_flight_gauge_(&Gauges(registry_, "pipeweaver_rpcs_in_flight",
                                    "Calls begun and not ended.")
                                 .Add({})),
      rpcs_(Counters(registry_, "pipeweaver_rpcs_total",
                     "Calls that have ended.")),
      plans_sealed_(Counters(registry_, "pipeweaver_plans_sealed_total",
                             "Plans sealed, by how they came about.")),
      steps_failed_(Counters(registry_, "pipeweaver_steps_failed_total",
                             "Steps sealed without a plan.")),
      search_seconds_(
          Histograms(registry_, "pipeweaver_search_seconds",
                     "Time of the search of a sealed plan, by the strategy "
                     "that found it.")),
      job_steps_held_(Gauges(registry_, "pipeweaver_job_steps_held",
                             "Steps of a job submitted or sealed and not "
                             "expired.")),
      job_predicted_seconds_(
          Gauges(registry_, "pipeweaver_job_predicted_step_seconds",
                 "Predicted time of the job's latest step.")),
      job_gap_(Gauges(registry_, "pipeweaver_job_gap_ratio",
                      "Gap between schedule and lower bound of the job's "
                      "latest step.")),
      job_measured_over_predicted_(
          Gauges(registry_, "pipeweaver_job_measured_over_predicted_ratio",
                 "Measured over predicted time of the job's latest report.")),
      job_measured_share_(
          Gauges(registry_, "pipeweaver_job_measured_share_ratio",
                 "Share of the job's latest predicted compute time that comes "
                 "from measured layers.")),
      job_cost_version_(Gauges(registry_, "pipeweaver_job_cost_version",
                               "Version of the costs that the job's next step "
                               "is planned with.")),
      job_measured_layers_(Gauges(registry_, "pipeweaver_job_measured_layers",
                                  "Layers measured, by shape and pass.")),
      job_error_before_(
          Gauges(registry_, "pipeweaver_job_stage_error_before_ratio",
                 "Mean error of predicted stage times over the latest steps "
                 "that calibration saw, without its factors.")),
      job_error_after_(
          Gauges(registry_, "pipeweaver_job_stage_error_after_ratio",
                 "Mean error of predicted stage times over the latest steps "
                 "that calibration saw, with its factors.")),
      job_extra_reserve_bytes_(
          Gauges(registry_, "pipeweaver_job_extra_reserve_bytes",
                 "Bytes set aside since reported peaks passed predictions, on "
                 "the rank with most.")),
      job_drift_(
          Gauges(registry_, "pipeweaver_job_drift",
                 "Replicas whose latest reported step's time parted from "
                 "the prediction.")) {
  Gauges(registry_, "pipeweaver_build_info",
         "Always 1; its label is the server's version.")
      .Add({{"version", kVersion}})
      .Set(1);
  auto& rpc_seconds =
      Histograms(registry_, "pipeweaver_rpc_seconds",
                 "Time of a call in the server, waiting for a plan included.");
  for (int i = 0; i < kNumRpcMethods; ++i) {
    rpc_seconds_[i] =
        &rpc_seconds.Add({{"method", kMethodNames[i]}}, CallTime());
  }
  auto& planning =
      Histograms(registry_, "pipeweaver_planning_seconds",
                 "Time from a step's acceptance to its sealed plan.");
  planning_seconds_[0] = nullptr;
  for (int i = 1; i < kNumPlanOrigins; ++i) {
    planning_seconds_[i] =
        &planning.Add({{"origin", kOriginNames[i]}}, Latency());
    plans_sealed_.Add({{"origin", kOriginNames[i]}});
  }
  // There from the start: Prometheus sees no increase in a counter that it has
  // not seen at 0.
  for (const absl::StatusCode code :
       {absl::StatusCode::kResourceExhausted,
        absl::StatusCode::kInvalidArgument,
        absl::StatusCode::kFailedPrecondition, absl::StatusCode::kInternal}) {
    steps_failed_.Add({{"code", absl::StatusCodeToString(code)}});
  }
  queue_seconds_ = &Histograms(registry_, "pipeweaver_queue_seconds",
                               "Time that a sealed step had waited for a "
                               "planning thread.")
                        .Add({}, Latency());
  check_seconds_ = &Histograms(registry_, "pipeweaver_check_seconds",
                               "Time of both checkers on a sealed plan.")
                        .Add({}, Latency());
  lower_seconds_ = &Histograms(registry_, "pipeweaver_lower_seconds",
                               "Time to lower a sealed plan to programs.")
                        .Add({}, Latency());
  gap_ = &Histograms(registry_, "pipeweaver_gap_ratio",
                     "Schedule makespan over its lower bound, less 1.")
              .Add({}, Gap());
  predicted_seconds_ =
      &Histograms(registry_, "pipeweaver_predicted_step_seconds",
                  "Predicted time of a planned step.")
           .Add({}, StepTime());
  measured_over_predicted_ =
      &Histograms(registry_, "pipeweaver_measured_over_predicted_ratio",
                  "Measured over predicted step time, as rank 0 reports it.")
           .Add({}, Ratio());
  plans_gave_way_ =
      &Counters(registry_, "pipeweaver_plans_gave_way_total",
                "Plans that gave way to others, as their bytes were more than "
                "may be held, before all ranks had read them.")
           .Add({});
  cost_versions_ = &Counters(registry_, "pipeweaver_cost_versions_total",
                             "Versions of jobs' costs taken up.")
                        .Add({});
  cost_versions_refused_ =
      &Counters(registry_, "pipeweaver_cost_versions_refused_total",
                "Versions of jobs' costs with which the job could not be "
                "planned.")
           .Add({});
  drifted_steps_ = &Counters(registry_, "pipeweaver_drifted_steps_total",
                             "Steps whose measured time parted from the "
                             "prediction.")
                        .Add({});
  like_lookups_ = &Counters(registry_, "pipeweaver_plan_cache_lookups_total",
                            "Steps for which a plan of the same metadata was "
                            "looked up.")
                       .Add({});
  like_hits_ = &Counters(registry_, "pipeweaver_plan_cache_hits_total",
                         "Lookups that found a plan of the same metadata.")
                    .Add({});
  jobs_ = &Gauges(registry_, "pipeweaver_jobs", "Jobs registered.").Add({});
  queue_length_ = &Gauges(registry_, "pipeweaver_queue_length",
                          "Steps and pinned registrations that wait for a "
                          "planning thread.")
                       .Add({});
  searches_running_ = &Gauges(registry_, "pipeweaver_planning_threads_busy",
                              "Planning threads at work.")
                           .Add({});
  auto& registrations_waiting =
      Gauges(registry_, "pipeweaver_registrations_waiting",
             "Registrations that wait for a thread to look for a layout.");
  registrations_waiting_ = &registrations_waiting.Add({});
  auto& registrations_running =
      Gauges(registry_, "pipeweaver_registrations_running",
             "Registrations for which a layout is looked for.");
  registrations_running_ = &registrations_running.Add({});
  questions_waiting_ =
      &Gauges(registry_, "pipeweaver_questions_waiting",
              "Comparisons and simulations that wait for a thread.")
           .Add({});
  questions_running_ = &Gauges(registry_, "pipeweaver_questions_running",
                               "Comparisons and simulations at work.")
                            .Add({});
  steps_held_ = &Gauges(registry_, "pipeweaver_steps_held",
                        "Steps submitted or sealed and not expired.")
                     .Add({});
  plan_bytes_ =
      &Gauges(registry_, "pipeweaver_plan_bytes", "Bytes of sealed plans held.")
           .Add({});
}

void Metrics::SetSources(
    std::function<Levels()> levels,
    std::function<int(const std::string&)> job_steps_held) {
  MutexLock lock(&mutex_);
  levels_ = std::move(levels);
  job_held_ = std::move(job_steps_held);
}

void Metrics::CountRpc(RpcMethod method, absl::StatusCode code,
                       std::chrono::nanoseconds time) {
  --rpcs_in_flight_;
  const int index = static_cast<int>(method);
  rpc_seconds_[index]->Observe(Seconds(time.count()));
  std::atomic<prometheus::Counter*>& counter =
      rpc_counters_[index][static_cast<int>(code)];
  if (counter.load() == nullptr) {
    counter = &rpcs_.Add({{"method", kMethodNames[index]},
                          {"code", absl::StatusCodeToString(code)}});
  }
  counter.load()->Increment();
}

void Metrics::OnJobRegistered(const std::string& job, uint64_t attempt) {
  spdlog::info("{}: registered, attempt {}", job, attempt);
  MutexLock lock(&mutex_);
  if (job_gauges_.size() >= max_job_labels_ || job_gauges_.count(job) > 0) {
    return;
  }
  const prometheus::Labels labels = {{"job", job}};
  job_gauges_[job] = {&job_steps_held_.Add(labels),
                      &job_predicted_seconds_.Add(labels),
                      &job_gap_.Add(labels),
                      &job_measured_over_predicted_.Add(labels),
                      &job_measured_share_.Add(labels),
                      &job_cost_version_.Add(labels),
                      &job_measured_layers_.Add(labels),
                      &job_error_before_.Add(labels),
                      &job_error_after_.Add(labels),
                      &job_extra_reserve_bytes_.Add(labels),
                      &job_drift_.Add(labels)};
}

void Metrics::OnJobRemoved(const std::string& job, bool unused) {
  spdlog::info("{}: removed{}", job,
               unused ? ", as it was not used for job_ttl_seconds" : "");
  MutexLock lock(&mutex_);
  const auto it = job_gauges_.find(job);
  if (it == job_gauges_.end()) return;
  job_steps_held_.Remove(it->second.steps_held);
  job_predicted_seconds_.Remove(it->second.predicted_seconds);
  job_gap_.Remove(it->second.gap);
  job_measured_over_predicted_.Remove(it->second.measured_over_predicted);
  job_measured_share_.Remove(it->second.measured_share);
  job_cost_version_.Remove(it->second.cost_version);
  job_measured_layers_.Remove(it->second.measured_layers);
  job_error_before_.Remove(it->second.error_before);
  job_error_after_.Remove(it->second.error_after);
  job_extra_reserve_bytes_.Remove(it->second.extra_reserve_bytes);
  job_drift_.Remove(it->second.drift);
  job_gauges_.erase(it);
}

void Metrics::OnLikeBatchLookup(bool found) {
  like_lookups_->Increment();
  if (found) like_hits_->Increment();
}

void Metrics::OnPlanSealed(const SealedPlan& sealed,
                           const PlanTimings& timings) {
  const search::StepReport& report = sealed.plan->report;
  const int origin = static_cast<int>(sealed.identity.origin);
  plans_sealed_.Add({{"origin", kOriginNames[origin]}}).Increment();
  planning_seconds_[origin]->Observe(Seconds(timings.submit_to_seal_ns));
  if (timings.queue_ns.has_value()) {
    queue_seconds_->Observe(Seconds(*timings.queue_ns));
  }
  if (sealed.identity.origin != PlanOrigin::kCached) {
    search_seconds_.Add({{"strategy", report.strategy}}, Latency())
        .Observe(Seconds(report.search_ns));
    check_seconds_->Observe(Seconds(report.check_ns));
    lower_seconds_->Observe(Seconds(report.lower_ns));
  }
  gap_->Observe(report.Gap());
  predicted_seconds_->Observe(Seconds(report.makespan_ns));
  MutexLock lock(&mutex_);
  const auto it = job_gauges_.find(sealed.identity.key.job);
  if (it == job_gauges_.end()) return;
  it->second.predicted_seconds->Set(Seconds(report.makespan_ns));
  it->second.gap->Set(report.Gap());
  it->second.measured_share->Set(report.measured_share);
}

void Metrics::OnStepFailed(const StepKey& key, const absl::Status& status) {
  spdlog::warn("{}: no plan: {}", DebugString(key), status.ToString());
  steps_failed_.Add({{"code", absl::StatusCodeToString(status.code())}})
      .Increment();
}

void Metrics::OnPlanGaveWay(const StepKey& key) {
  spdlog::warn(
      "{}: its plan gave way before all ranks had read it: sealed plans hold "
      "more than max_plan_bytes",
      DebugString(key));
  plans_gave_way_->Increment();
}

void Metrics::OnReport(const std::string& job, double ratio) {
  measured_over_predicted_->Observe(ratio);
  MutexLock lock(&mutex_);
  const auto it = job_gauges_.find(job);
  if (it != job_gauges_.end()) it->second.measured_over_predicted->Set(ratio);
}

void Metrics::OnCosts(const std::string& job, const CostVersion& version,
                      bool is_new) {
  const semu::Calibration& calibration = version.calibration;
  if (is_new) {
    cost_versions_->Increment();
    spdlog::info(
        "job '{}': costs version {}: {} measured layers; calibration fitted to "
        "{} stage times, the latest with a mean error of {:.4f} before and "
        "{:.4f} after it",
        job, version.number, version.measured_layers, calibration.observations,
        calibration.error_before, calibration.error_after);
  }
  MutexLock lock(&mutex_);
  const auto it = job_gauges_.find(job);
  if (it == job_gauges_.end()) return;
  it->second.cost_version->Set(static_cast<double>(version.number));
  it->second.measured_layers->Set(static_cast<double>(version.measured_layers));
  it->second.error_before->Set(calibration.error_before);
  it->second.error_after->Set(calibration.error_after);
  int64_t most_bytes = 0;
  for (const int64_t bytes : version.extra_reserve_bytes) {
    most_bytes = std::max(most_bytes, bytes);
  }
  it->second.extra_reserve_bytes->Set(static_cast<double>(most_bytes));
}

void Metrics::OnCostsRefused(const std::string& job,
                             const absl::Status& status) {
  cost_versions_refused_->Increment();
  spdlog::warn(
      "job '{}': planned with older costs, since new ones are refused: "
      "{}",
      job, status.ToString());
}

void Metrics::OnDrift(const StepKey& key, const JobCosts::DriftState& state) {
  if (state.drift) {
    drifted_steps_->Increment();
    if (state.changed) {
      spdlog::warn(
          "{}: took {:.3f} s, predicted {:.3f} s: {:+.1f} %, beyond {:.1f} %; "
          "said again when it ends",
          DebugString(key), Seconds(state.drift->measured_ns),
          Seconds(state.drift->predicted_ns), 100 * state.drift->relative_error,
          100 * state.drift->limit);
    }
  } else {
    spdlog::info("{}: as predicted again", DebugString(key));
  }
  MutexLock lock(&mutex_);
  const auto it = job_gauges_.find(key.job);
  if (it != job_gauges_.end()) it->second.drift->Set(state.drifting);
}

std::vector<prometheus::MetricFamily> Metrics::Collect() const {
  rpcs_in_flight_gauge_->Set(rpcs_in_flight_);
  MutexLock lock(&mutex_);
  if (levels_ != nullptr) {
    const Levels levels = levels_();
    jobs_->Set(levels.jobs);
    queue_length_->Set(levels.queue_length);
    searches_running_->Set(levels.searches_running);
    steps_held_->Set(levels.steps_held);
    plan_bytes_->Set(static_cast<double>(levels.plan_bytes));
    registrations_waiting_->Set(levels.registrations_waiting);
    registrations_running_->Set(levels.registrations_running);
    questions_waiting_->Set(levels.questions_waiting);
    questions_running_->Set(levels.questions_running);
  }
  if (job_held_ != nullptr) {
    for (const auto& [job, gauges] : job_gauges_) {
      gauges.steps_held->Set(job_held_(job));
    }
  }
  return registry_.Collect();
}

}  // namespace pipeweaver::server
