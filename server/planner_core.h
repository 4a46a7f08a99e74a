// The server without its wire: jobs, steps, searches and deadlines brought
// together. What handlers call.

#ifndef SERVER_PLANNER_CORE_H_
#define SERVER_PLANNER_CORE_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <deque>
#include <functional>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "search/joint_planner.h"
#include "search/planner.h"
#include "semu/base/mutex.h"
#include "semu/cost/measured/measured_cost.h"
#include "semu/model/batch.h"
#include "semu/model/job.h"
#include "server/clock.h"
#include "server/job_costs.h"
#include "server/job_registry.h"
#include "server/plan_codec.h"
#include "server/planner_observer.h"
#include "server/planning_pool.h"
#include "server/sealed_plan.h"
#include "server/step_table.h"

namespace pipeweaver::server {

struct PlannerCoreOptions {
  // Threads that plan, >= 1. More search more steps at once; a search may use
  // those that are idle when it starts.
  int planner_threads = 1;
  // Steps that wait for a thread, and questions likewise; more are refused.
  int max_queued = 4096;
  int max_jobs = 1024;
  // A job is removed when it was not registered, and no step of it submitted or
  // held, for so long.
  Clock::Duration job_ttl = std::chrono::hours(7 * 24);
  // Time for the search of a step that gives no budget of its own.
  Clock::Duration search_budget = std::chrono::milliseconds(50);
  // Most time for a search with a budget of evaluations.
  Clock::Duration max_search = std::chrono::seconds(10);
  // A step is sealed this long before it is needed.
  Clock::Duration seal_margin = std::chrono::milliseconds(2);
  StepTable::Options steps;
  // Layers measured before a job comes; null: none.
  std::function<std::vector<semu::MeasuredLayer>(const semu::Job&)>
      measured_layers;
};

// A step as a trainer submits it, validated against its job.
struct StepSubmission {
  StepKey key;
  std::shared_ptr<const RegisteredJob> job;
  std::string layout_digest;  // that the trainer plans for
  semu::Batch batch;
  std::string batch_digest;
  int64_t batch_bytes = 0;
  std::optional<Clock::Duration> needed_in;
  uint64_t seed = 0;
  int64_t budget_evaluations = 0;
  bool shadow = false;
  std::optional<Clock::Duration> joint_wait;
  bool move_microbatches = false;
  double duration_noise = 0;
};

struct StepReportIn {
  StepKey key;
  std::string plan_digest;
  uint32_t rank = 0;
  // Sizes of the columns of measured times; 0 when they are absent.
  int64_t num_start_offsets = 0;
  std::vector<uint64_t> duration_ns;
  uint64_t step_ns = 0;
  uint64_t peak_memory_bytes = 0;  // 0: not measured
};

// One strategy's answer to a batch. The first outcome of a comparison is the
// planner's own, named "planner".
struct StrategyOutcome {
  std::string strategy;
  absl::StatusOr<search::StepReport> report;
};

// Thread-safe. Callbacks may run on the calling thread, on one that plans or
// on the keeper's, and must not block.
class PlannerCore {
 public:
  // What is passed by pointer must outlive the core; `observer` may be null.
  PlannerCore(const PlannerCoreOptions& options,
              const search::StepPlanner* planner, const PlanCodec* codec,
              Clock* clock, PlannerObserver* observer);
  // Stops.
  ~PlannerCore();
  PlannerCore(const PlannerCore&) = delete;
  PlannerCore& operator=(const PlannerCore&) = delete;

  // Prepares the job on a planning thread unless it is known. Nothing is
  // registered when `cancelled` was set before the job is ready. Errors:
  // ALREADY_EXISTS, RESOURCE_EXHAUSTED, CANCELLED, what Prepare returns.
  using RegisterCallback =
      std::function<void(absl::StatusOr<std::shared_ptr<const RegisteredJob>>)>;
  void RegisterJob(Registration registration, const CancelFlag& cancelled,
                   RegisterCallback done);

  // Errors of these: see JobRegistry.
  absl::Status ConfirmLayout(absl::string_view job, uint64_t attempt,
                             absl::string_view layout_digest);
  absl::Status RemoveJob(const std::string& job);
  const JobRegistry& registry() const { return registry_; }

  // The job of a key. Errors: those of JobRegistry::FindAttempt;
  // INVALID_ARGUMENT for a replica that the job has not.
  absl::StatusOr<std::shared_ptr<const RegisteredJob>> CheckKey(
      const StepKey& key) const;

  // Accepts a step for planning; returns before it is planned. Errors: those of
  // StepTable::Submit; FAILED_PRECONDITION when the layout is not confirmed or
  // is another; RESOURCE_EXHAUSTED when the queue is full.
  absl::Status SubmitStep(StepSubmission submission);
  absl::Status CancelStep(const StepKey& key);

  // See StepTable::Read. Errors also: those of CheckKey.
  uint64_t ReadStep(const StepKey& key, StepTable::ReadCallback done);
  void CancelRead(const StepKey& key, uint64_t handle);
  void NoteFetched(const StepKey& key, uint32_t rank);

  // The step's sealed plan, without waiting. Errors: those of ReadStep;
  // FAILED_PRECONDITION when it is not sealed yet.
  StepResult SealedStep(const StepKey& key);

  // Takes what a rank measured. What it says of costs is worked out on a thread
  // of low priority, and left out when too much waits for that.
  // Errors: those of SealedStep; FAILED_PRECONDITION for another digest than
  // the plan's; OUT_OF_RANGE for the rank; INVALID_ARGUMENT for columns that do
  // not fit the program, or times or sizes out of range.
  absl::Status ReportStep(StepReportIn report);

  // Takes measured layers of a job. Errors: those of JobRegistry::Find.
  absl::Status AddMeasuredLayers(
      absl::string_view job, const std::vector<semu::MeasuredLayer>& layers);

  // Plans `batch` by the planner and by each strategy of `strategies`, each as
  // a task of the job. Stops early at `deadline` or when `cancelled` is set.
  // Errors: RESOURCE_EXHAUSTED when the queue is full; CANCELLED; UNAVAILABLE
  // when stopped.
  using CompareCallback =
      std::function<void(absl::StatusOr<std::vector<StrategyOutcome>>)>;
  void CompareStrategies(std::shared_ptr<const RegisteredJob> job,
                         semu::Batch batch, std::vector<std::string> strategies,
                         uint64_t seed, int64_t budget_evaluations,
                         Clock::TimePoint deadline, CancelFlag cancelled,
                         CompareCallback done);

  // Runs `task`, which answers a question, at the turn of `job` on a thread of
  // low priority that no step waits for. `task` is called exactly once, with a
  // status other than OK when it is not to run: RESOURCE_EXHAUSTED (queue
  // full), CANCELLED, or UNAVAILABLE (stopped). It should end soon once `end`
  // is set: the question is cancelled, or the core stops.
  void RunQuestion(
      const std::string& job, const CancelFlag& cancelled,
      std::function<void(absl::Status, const std::atomic<bool>& end)> task);

  // Gives back the places of tasks that are cancelled and still wait, and ends
  // the joint searches all steps of which are cancelled. Call after setting
  // flags.
  void DropCancelled();

  int HeldSteps(const std::string& job) const { return table_.HeldSteps(job); }
  StepTable::Held held() const { return table_.held(); }
  PlanningPool::Load load() const { return pool_.load(); }
  // Registrations that wait for a layout or look for one.
  PlanningPool::Load registrations() const { return registrations_.load(); }
  PlanningPool::Load questions() const { return questions_.load(); }
  std::vector<std::string> StrategyNames() const {
    return planner_->StrategyNames();
  }

  // Ends the registrations that wait for a layout or look for one, with
  // UNAVAILABLE. Idempotent.
  void EndRegistrations();

  // Steps wait for other replicas no longer: those that do are planned without
  // them. Idempotent.
  void EndJointWaits();

  // Takes no more, ends all searches and questions, and answers all that wait
  // with UNAVAILABLE, without waiting for what runs. Idempotent.
  void BeginStop();
  // BeginStop, and waits for what runs. Idempotent.
  void Stop();

 private:
  struct Comparison;
  class Running;

  // Replicas of a step that wait to be planned together. Each holds a place in
  // the pool's queue.
  using JointSteps = std::vector<std::shared_ptr<const PendingStep>>;
  // What replicas' plans made in one search have in common.
  struct JointSearch {
    std::string batch_digests;       // of all, in the order of replicas
    uint64_t seed = 0;               // of the first replica that takes part
    int64_t budget_evaluations = 0;  // of all together; 0: time alone
    int64_t queue_ns = 0;            // wait for a thread, once all were there
  };
  using JointKey = std::tuple<std::string, uint64_t, uint64_t>;

  // Answers a registration that needs no layout to be found: a repeated one,
  // one of a known job, one that is refused. False: it is none of these.
  bool AnsweredAtOnce(const Registration& registration,
                      const RegisterCallback& done);
  // As RunQuestion, to the end, on the thread that learns from reports.
  void RunLearning(const std::string& job,
                   std::function<void(absl::Status)> task);
  // As RunQuestion, to the end, on a thread of `pool`. REQUIRES: a reserved
  // place there.
  void RunOn(PlanningPool& pool, const std::string& job, CancelFlag cancelled,
             std::function<void(absl::Status)> task);

  void PlanStep(const std::shared_ptr<const PendingStep>& step);
  // Lets the step wait for the other replicas; enqueues them if it is the last.
  void JoinStep(const std::shared_ptr<const PendingStep>& step);
  void EnqueueJointly(JointSteps joint);
  // Steps that wait for other replicas.
  int JointWaiting() const;
  // When those that are there, at least one, are planned without the others.
  static Clock::TimePoint StartOf(const JointSteps& joint);
  // Forgets those that were withdrawn, abandoned or sealed, and gives their
  // places back.
  void DropCancelled(JointSteps& joint)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(joint_mutex_);
  // A step whose time has come gets a plan without a search.
  void EnqueueFallback(const std::shared_ptr<const PendingStep>& step);
  // Those whose wait is over, or when the next one's will be.
  std::vector<JointSteps> TakeJointDue(Clock::TimePoint now);
  std::optional<Clock::TimePoint> NextJointStart() const;
  void PlanJointSteps(
      const std::vector<std::shared_ptr<const PendingStep>>& steps,
      Clock::TimePoint queued_at);
  // Seals the plans of all replicas' dealt-out batches, made with `job`, or,
  // where one of them failed or somebody was first with a step, a plan of its
  // own batch for each.
  void SealDealtSteps(
      const std::vector<std::shared_ptr<const PendingStep>>& steps,
      const search::DealtBatches& dealt, const RegisteredJob& job,
      std::vector<absl::StatusOr<search::StepPlan>> plans, bool cut,
      const JointSearch& joint, search::WorkerPool* workers);
  // The identity of a step's plan made with `job`, as far as the arguments say;
  // `joint` is null for a step planned alone.
  static PlanIdentity IdentityOf(const StepRequest& request,
                                 const RegisteredJob& job,
                                 const JointSearch* joint);
  // Seals `plan`, made with `job`, under the step's key unless somebody was
  // first.
  void SealPlan(const PendingStep& step, const RegisteredJob& job,
                std::shared_ptr<const search::StepPlan> plan, PlanOrigin origin,
                std::string warm_start_digest, const JointSearch* joint,
                std::optional<int64_t> queue_ns, search::WorkerPool* workers);
  void SealFailure(const PendingStep& step, const absl::Status& status);
  // Seals without a search: a like batch's plan, else the safe program.
  // `why_no_search` is the answer when not even that exists.
  void SealFallback(const PendingStep& step, const absl::Status& why_no_search);
  // Of a step, beside the other steps; of a question, beside steps and
  // questions.
  int ThreadsForSearch() const;
  int ThreadsForQuestion() const;
  // So many threads for a step, the calling one included; they wait for the
  // next step when this one has let go of them.
  std::shared_ptr<search::WorkerPool> TakeWorkers(int threads);
  // Why a pool had no place.
  absl::Status QueueFull() const;
  // What checking, lowering and serialising a plan of the job will take, by
  // what they took; before any plan of it, a guess within `until_sealed`.
  std::chrono::nanoseconds SealTime(const std::string& job,
                                    Clock::Duration until_sealed) const;
  // A plan of a batch with the same metadata; null: none.
  std::shared_ptr<const SealedPlan> LikeBatch(const StepRequest& request);
  // Those of the job if it is known, else new ones.
  std::shared_ptr<JobCosts> CostsOf(const Registration& registration) const;
  // Brings a registration to the table.
  void Begin(const RegisteredJob& job)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(lifecycle_mutex_);
  // Learns from a rank's report, on the thread that learns.
  void Learn(const SealedPlan& sealed, const StepReportIn& report);
  // Brings out a new version of the job's costs, on the thread that learns, if
  // one is due.
  void RepriceIfDue(const std::shared_ptr<const RegisteredJob>& job);
  // False: there is no plan with the costs that are current now.
  bool Reprice(const std::string& name);
  void KeepDeadlines();
  void DropUnusedJobs(Clock::TimePoint now);
  void WakeKeeper();
  // Frees a plan that a step has replaced, if there is one: on the keeper's
  // thread, a while later. It takes up to a millisecond, and ranks that fetch
  // the step's programs would wait for it.
  void DiscardLater(StepResult replaced);

  const PlannerCoreOptions options_;
  const search::StepPlanner* const planner_;
  const PlanCodec* const codec_;
  Clock* const clock_;
  PlannerObserver* const observer_;

  // Held over each change that touches both registry and table.
  Mutex lifecycle_mutex_;
  JobRegistry registry_;
  StepTable table_;
  PlanningPool pool_;
  // For layouts, which take seconds: steps find their threads, and come first.
  PlanningPool registrations_;
  // For comparisons and simulations, likewise.
  PlanningPool questions_;
  // For what reports and profiles say of costs, likewise.
  PlanningPool learning_;
  // For steps whose time has come: they wait behind no search, and a job leaves
  // a thread to others.
  PlanningPool fallbacks_;

  // What runs and may be ended, apart from searches for one step or a layout.
  Mutex running_mutex_;
  std::list<Running*> running_ ABSL_GUARDED_BY(running_mutex_);

  Mutex workers_mutex_;
  std::unique_ptr<search::WorkerPool> idle_workers_
      ABSL_GUARDED_BY(workers_mutex_);  // of the last step, or null

  mutable Mutex joint_mutex_;
  std::map<JointKey, JointSteps> joint_ ABSL_GUARDED_BY(joint_mutex_);
  bool joint_waits_end_ ABSL_GUARDED_BY(joint_mutex_) = false;
  // Ends searches for layouts.
  std::atomic<bool> registrations_end_ = false;
  std::atomic<bool> stopping_ = false;

  Mutex keeper_mutex_;
  CondVar keeper_wake_;
  bool keeper_woken_ ABSL_GUARDED_BY(keeper_mutex_) = false;
  bool keeper_stopped_ ABSL_GUARDED_BY(keeper_mutex_) = false;
  struct Discarded {
    Clock::TimePoint at;
    std::shared_ptr<const SealedPlan> plan;
  };
  // By time.
  std::deque<Discarded> discarded_ ABSL_GUARDED_BY(keeper_mutex_);
  std::thread keeper_;
};

}  // namespace pipeweaver::server

#endif  // SERVER_PLANNER_CORE_H_
