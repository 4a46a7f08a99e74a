// See planner_core.h.

#include "server/planner_core.h"

#include <algorithm>
#include <atomic>
#include <iterator>
#include <limits>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "search/cost_observations.h"
#include "search/joint_planner.h"
#include "search/strategy/worker_pool.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::server {
namespace {

// Of what a report may claim: 11 days, a PiB.
constexpr uint64_t kMaxReportedNs = 1'000'000'000'000'000;
constexpr std::chrono::milliseconds kFirstSealTime{20};
// From a step's sealing on: ranks mostly have its programs by then.
constexpr std::chrono::milliseconds kDiscardAfter{20};
// Layouts take seconds to find, steps must not. Few are looked for at a time,
// and few wait, since each holds its samples.
constexpr int kRegistrations = 2;
constexpr int kRegistrationsQueued = 16;
// Of the threads that steps do not wait for.
constexpr int kNiceness = 10;
// That a layout is looked for with; more would find nothing to do.
constexpr int kMostLayoutThreads = 8;

absl::Status CheckMost(absl::string_view field, uint64_t value, uint64_t most) {
  if (value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, ", must be at most ", most));
}

int64_t Nanoseconds(Clock::Duration duration) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count();
}

absl::Status RegistrationsFull() {
  return absl::ResourceExhaustedError(
      absl::StrCat("queue: ", kRegistrationsQueued,
                   " registrations wait for a layout, the limit: try again "
                   "later, or pin the layout"));
}

// All replicas of the step are here, and all let their microbatches move.
bool MayMove(const std::vector<std::shared_ptr<const PendingStep>>& steps,
             int replicas) {
  if (static_cast<int>(steps.size()) != replicas) return false;
  return std::all_of(steps.begin(), steps.end(), [&](const auto& step) {
    return step->request->move_microbatches &&
           step->request->shadow == steps[0]->request->shadow;
  });
}

}  // namespace

PlannerCore::PlannerCore(const PlannerCoreOptions& options,
                         const search::StepPlanner* planner,
                         const PlanCodec* codec, Clock* clock,
                         PlannerObserver* observer)
    : options_(options),
      planner_(planner),
      codec_(codec),
      clock_(clock),
      observer_(observer),
      registry_(options.max_jobs, clock->UnixSeconds()),
      table_(options.steps,
             [this](const StepKey& key) {
               if (observer_ != nullptr) observer_->OnPlanGaveWay(key);
             }),
      pool_(options.planner_threads, options.max_queued),
      registrations_(std::min(options.planner_threads, kRegistrations),
                     kRegistrationsQueued, std::numeric_limits<int>::max(),
                     kNiceness),
      questions_(std::max(1, options.planner_threads / 2), options.max_queued,
                 std::numeric_limits<int>::max(), kNiceness),
      learning_(/*threads=*/1, options.max_queued,
                std::numeric_limits<int>::max(), kNiceness),
      fallbacks_(options.planner_threads + 1, std::numeric_limits<int>::max(),
                 options.planner_threads),
      keeper_([this] { KeepDeadlines(); }) {}

PlannerCore::~PlannerCore() { Stop(); }

// A joint search, or a question, from its beginning to its end.
class PlannerCore::Running {
 public:
  // Sets `end` once all of `wanted_by` are set, or the core stops.
  Running(PlannerCore* core, std::vector<CancelFlag> wanted_by, CancelFlag end)
      : core_(core), wanted_by_(std::move(wanted_by)), end_(std::move(end)) {
    MutexLock lock(&core_->running_mutex_);
    place_ = core_->running_.insert(core_->running_.end(), this);
    EndIfUnwanted();
  }
  ~Running() {
    MutexLock lock(&core_->running_mutex_);
    core_->running_.erase(place_);
  }
  Running(const Running&) = delete;
  Running& operator=(const Running&) = delete;

  void EndIfUnwanted() {
    if (core_->stopping_ ||
        std::all_of(wanted_by_.begin(), wanted_by_.end(),
                    [](const CancelFlag& flag) { return flag->load(); })) {
      end_->store(true);
    }
  }

 private:
  PlannerCore* const core_;
  const std::vector<CancelFlag> wanted_by_;
  const CancelFlag end_;
  std::list<Running*>::iterator place_;
};

void PlannerCore::EndRegistrations() {
  registrations_end_ = true;
  registrations_.StopTaking();
}

void PlannerCore::BeginStop() {
  stopping_ = true;
  EndRegistrations();
  table_.AbandonPending(absl::UnavailableError("the server shuts down"));
  pool_.StopTaking();
  questions_.StopTaking();
  learning_.StopTaking();
  fallbacks_.StopTaking();
  DropCancelled();
}

void PlannerCore::Stop() {
  {
    MutexLock lock(&keeper_mutex_);
    keeper_stopped_ = true;
    keeper_wake_.NotifyAll();
  }
  if (keeper_.joinable()) keeper_.join();
  BeginStop();
  pool_.Stop();
  questions_.Stop();
  learning_.Stop();
  registrations_.Stop();
  fallbacks_.Stop();
}

absl::Status PlannerCore::QueueFull() const {
  if (stopping_) return absl::UnavailableError("the server shuts down");
  return absl::ResourceExhaustedError(
      absl::StrCat("queue: full, ", options_.max_queued,
                   " may wait for a thread (max_queued): try again later"));
}

void PlannerCore::RunQuestion(
    const std::string& job, const CancelFlag& cancelled,
    std::function<void(absl::Status, const std::atomic<bool>& end)> task) {
  if (!questions_.Reserve()) {
    task(QueueFull(), *cancelled);
    return;
  }
  RunOn(questions_, job, cancelled,
        [this, cancelled, task = std::move(task)](absl::Status status) {
          const auto end = std::make_shared<std::atomic<bool>>(false);
          const Running running(this, {cancelled}, end);
          task(std::move(status), *end);
        });
}

void PlannerCore::RunLearning(const std::string& job,
                              std::function<void(absl::Status)> task) {
  if (!learning_.Reserve()) {
    task(QueueFull());
    return;
  }
  RunOn(learning_, job, std::make_shared<std::atomic<bool>>(false),
        std::move(task));
}

void PlannerCore::RunOn(PlanningPool& pool, const std::string& job,
                        CancelFlag cancelled,
                        std::function<void(absl::Status)> task) {
  PlanningPool::Task queued;
  queued.job = job;
  queued.cancelled = cancelled;
  queued.run = [cancelled = std::move(cancelled),
                task = std::move(task)](bool dropped) {
    if (!dropped) {
      task(absl::OkStatus());
    } else if (cancelled->load()) {
      task(absl::CancelledError("the call was cancelled"));
    } else {
      task(absl::UnavailableError("the server shuts down"));
    }
  };
  pool.Enqueue(std::move(queued));
}

void PlannerCore::Begin(const RegisteredJob& job) {
  registry_.NoteUsed(job.name, clock_->Now());
  WakeKeeper();
  // A repeated request gets the answer that it got before.
  if (!table_.BeginAttempt(job.name, job.attempt)) return;
  DropCancelled();
  if (observer_ == nullptr) return;
  observer_->OnJobRegistered(job.name, job.attempt);
  // The version's reserve may be that of the layout before.
  CostVersion version = *job.cost_version;
  version.extra_reserve_bytes = job.plannable->extra_reserve_bytes;
  observer_->OnCosts(job.name, version, /*is_new=*/false);
}

std::shared_ptr<JobCosts> PlannerCore::CostsOf(
    const Registration& registration) const {
  const auto known = registry_.Find(registration.job.name);
  if (known.ok() && (*known)->job_digest == registration.job_digest) {
    return (*known)->costs;
  }
  return std::make_shared<JobCosts>(
      registration.job, planner_->Costs(),
      options_.measured_layers == nullptr
          ? std::vector<semu::MeasuredLayer>()
          : options_.measured_layers(registration.job));
}

bool PlannerCore::AnsweredAtOnce(const Registration& registration,
                                 const RegisterCallback& done) {
  absl::StatusOr<std::shared_ptr<const RegisteredJob>> answer;
  {
    MutexLock lock(&lifecycle_mutex_);
    auto known = registry_.TryRegister(registration);
    if (known.ok() && !known->has_value()) return false;
    if (known.ok()) {
      answer = **std::move(known);
      Begin(**answer);
    } else {
      answer = known.status();
    }
  }
  done(std::move(answer));
  return true;
}

void PlannerCore::RegisterJob(Registration registration,
                              const CancelFlag& cancelled,
                              RegisterCallback done) {
  if (AnsweredAtOnce(registration, done)) return;
  const std::string name = registration.job.name;
  // With a layout there is nothing to look for.
  const bool pinned = registration.pinned.has_value();
  PlanningPool& pool = pinned ? pool_ : registrations_;
  if (!pool.Reserve()) {
    done(pinned               ? QueueFull()
         : registrations_end_ ? absl::UnavailableError("the server shuts down")
                              : RegistrationsFull());
    return;
  }
  RunOn(pool, name, cancelled,
        [this, cancelled, registration = std::move(registration),
         done = std::move(done)](const absl::Status& status) {
          if (!status.ok()) {
            done(status);
            return;
          }
          // Another call may have registered it meanwhile.
          if (AnsweredAtOnce(registration, done)) return;
          PreparedJob prepared;
          prepared.costs = CostsOf(registration);
          prepared.cost_version = prepared.costs->current();
          // What is known of memory is of the layout before.
          search::PrepareOptions options;
          options.costs = prepared.cost_version->costs;
          options.samples = registration.samples;
          options.threads = std::min(pool_.threads(), kMostLayoutThreads);
          options.cancelled = [this, cancelled] {
            return cancelled->load() || registrations_end_;
          };
          auto plannable =
              planner_->Prepare(registration.job, registration.pinned, options);
          if (!plannable.ok()) {
            done(registrations_end_ && !cancelled->load()
                     ? absl::UnavailableError("the server shuts down")
                     : plannable.status());
            return;
          }
          prepared.plannable = *std::move(plannable);
          prepared.layout_digest = codec_->LayoutDigest(
              prepared.plannable->job, prepared.plannable->layout);
          prepared.profile_digest = codec_->ProfileDigest(*prepared.plannable);
          const auto costs = prepared.costs;
          absl::StatusOr<std::shared_ptr<const RegisteredJob>> job;
          {
            MutexLock lock(&lifecycle_mutex_);
            if (cancelled->load()) {
              job = absl::CancelledError("the call was cancelled");
            } else {
              job = registry_.Commit(registration, std::move(prepared));
              if (job.ok()) {
                if ((*job)->costs == costs) costs->BeginLayout();
                Begin(**job);
              }
            }
          }
          // A version may have come out while it was prepared.
          if (job.ok()) RepriceIfDue(*job);
          done(std::move(job));
        });
}

absl::Status PlannerCore::ConfirmLayout(absl::string_view job, uint64_t attempt,
                                        absl::string_view layout_digest) {
  return registry_.ConfirmLayout(job, attempt, layout_digest);
}

absl::Status PlannerCore::RemoveJob(const std::string& job) {
  {
    MutexLock lock(&lifecycle_mutex_);
    PW_RETURN_IF_ERROR(registry_.Remove(job));
    table_.EndJob(job);
    if (observer_ != nullptr) observer_->OnJobRemoved(job, /*unused=*/false);
  }
  DropCancelled();
  return absl::OkStatus();
}

absl::Status PlannerCore::SubmitStep(StepSubmission submission) {
  const RegisteredJob& job = *submission.job;
  if (!job.layout_confirmed) {
    return absl::FailedPreconditionError(
        absl::StrCat("layout: that of job '", job.name,
                     "' is not confirmed: call ConfirmLayout first"));
  }
  if (submission.layout_digest != job.layout_digest) {
    return absl::FailedPreconditionError(absl::StrCat(
        "layout_digest: ", absl::BytesToHexString(submission.layout_digest),
        " is not that of job '", job.name, "', ",
        absl::BytesToHexString(job.layout_digest)));
  }
  const Clock::TimePoint now = clock_->Now();
  auto request = std::make_shared<StepRequest>();
  request->key = std::move(submission.key);
  request->job = std::move(submission.job);
  request->batch = std::move(submission.batch);
  request->batch_digest = std::move(submission.batch_digest);
  request->batch_bytes = submission.batch_bytes;
  request->seed = submission.seed;
  request->budget_evaluations = submission.budget_evaluations;
  request->shadow = submission.shadow;
  request->joint_wait = submission.joint_wait;
  request->move_microbatches = submission.move_microbatches;
  request->duration_noise = submission.duration_noise;
  request->submitted_at = now;
  if (submission.needed_in.has_value()) {
    request->seal_at = now + *submission.needed_in - options_.seal_margin;
  }
  // Those that wait for other replicas leave half of the queue to others.
  if (request->joint_wait.has_value() &&
      JointWaiting() >= std::max(1, options_.max_queued / 2)) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "queue: half full, of ", options_.max_queued,
        " places (max_queued), of steps that wait for other replicas: try "
        "again later"));
  }
  // The place comes first: what the table accepts must also find a thread.
  if (!pool_.Reserve()) return QueueFull();
  StepResult replaced = nullptr;
  auto step = table_.Submit(request, &replaced);
  if (!step.ok() || *step == nullptr) {
    pool_.Release();
    return step.status();
  }
  registry_.NoteUsed(request->key.job, now);
  if (request->seal_at.has_value()) WakeKeeper();
  if (request->joint_wait.has_value()) {
    JoinStep(*step);
    DiscardLater(std::move(replaced));
    return absl::OkStatus();
  }
  PlanningPool::Task task;
  task.job = request->key.job;
  if (request->seal_at.has_value()) task.needed_at = *request->seal_at;
  task.cancelled = (*step)->cancelled;
  // A dropped step was sealed, withdrawn or abandoned: nobody waits on it.
  task.run = [this, step = *std::move(step),
              replaced = std::move(replaced)](bool dropped) mutable {
    if (!dropped) PlanStep(step);
    DiscardLater(std::move(replaced));
  };
  pool_.Enqueue(std::move(task));
  return absl::OkStatus();
}

void PlannerCore::JoinStep(const std::shared_ptr<const PendingStep>& step) {
  const StepRequest& request = *step->request;
  const size_t replicas = request.job->plannable->job.parallelism.data_parallel;
  const JointKey key(request.key.job, request.key.attempt, request.key.step);
  JointSteps ready;
  {
    MutexLock lock(&joint_mutex_);
    const auto it = joint_.try_emplace(key).first;
    JointSteps& joint = it->second;
    joint.push_back(step);
    // One withdrawn meanwhile may have been submitted again; this one may have
    // been withdrawn by now.
    DropCancelled(joint);
    if (joint.empty() || joint.size() == replicas || joint_waits_end_) {
      ready = std::move(joint);
      joint_.erase(it);
    }
  }
  if (ready.empty()) {
    WakeKeeper();
  } else {
    EnqueueJointly(std::move(ready));
  }
}

int PlannerCore::JointWaiting() const {
  MutexLock lock(&joint_mutex_);
  int waiting = 0;
  for (const auto& [key, steps] : joint_) {
    waiting += static_cast<int>(steps.size());
  }
  return waiting;
}

void PlannerCore::EndJointWaits() {
  std::map<JointKey, JointSteps> waiting;
  {
    MutexLock lock(&joint_mutex_);
    joint_waits_end_ = true;
    waiting.swap(joint_);
  }
  for (auto& [key, steps] : waiting) EnqueueJointly(std::move(steps));
}

void PlannerCore::DropCancelled(JointSteps& joint) {
  for (size_t n = std::erase_if(
           joint, [](const auto& step) { return step->cancelled->load(); });
       n > 0; --n) {
    pool_.Release();
  }
}

void PlannerCore::DropCancelled() {
  pool_.DropCancelled();
  registrations_.DropCancelled();
  questions_.DropCancelled();
  {
    MutexLock lock(&running_mutex_);
    for (Running* running : running_) running->EndIfUnwanted();
  }
  MutexLock lock(&joint_mutex_);
  for (auto it = joint_.begin(); it != joint_.end();) {
    DropCancelled(it->second);
    it = it->second.empty() ? joint_.erase(it) : std::next(it);
  }
}

Clock::TimePoint PlannerCore::StartOf(const JointSteps& joint) {
  const StepRequest& first = *joint.front()->request;
  return first.submitted_at + *first.joint_wait;
}

void PlannerCore::EnqueueJointly(JointSteps joint) {
  // One task takes one of their places.
  for (size_t i = 1; i < joint.size(); ++i) pool_.Release();
  PlanningPool::Task task;
  task.job = joint[0]->request->key.job;
  for (const auto& step : joint) {
    if (step->request->seal_at.has_value()) {
      task.needed_at = std::min(task.needed_at, *step->request->seal_at);
    }
  }
  // Each step is left out by itself when it is cancelled.
  task.cancelled = std::make_shared<std::atomic<bool>>(false);
  task.run = [this, steps = std::move(joint),
              queued_at = clock_->Now()](bool dropped) {
    if (!dropped) PlanJointSteps(steps, queued_at);
  };
  pool_.Enqueue(std::move(task));
}

std::vector<PlannerCore::JointSteps> PlannerCore::TakeJointDue(
    Clock::TimePoint now) {
  std::vector<JointSteps> due;
  MutexLock lock(&joint_mutex_);
  for (auto it = joint_.begin(); it != joint_.end();) {
    if (StartOf(it->second) > now) {
      ++it;
      continue;
    }
    due.push_back(std::move(it->second));
    it = joint_.erase(it);
  }
  return due;
}

std::optional<Clock::TimePoint> PlannerCore::NextJointStart() const {
  std::optional<Clock::TimePoint> next;
  MutexLock lock(&joint_mutex_);
  for (const auto& [key, joint] : joint_) {
    const Clock::TimePoint start = StartOf(joint);
    next = std::min(next.value_or(start), start);
  }
  return next;
}

absl::Status PlannerCore::CancelStep(const StepKey& key) {
  PW_RETURN_IF_ERROR(CheckKey(key).status());
  PW_RETURN_IF_ERROR(table_.Cancel(key));
  DropCancelled();
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const RegisteredJob>> PlannerCore::CheckKey(
    const StepKey& key) const {
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const RegisteredJob> job,
                      registry_.FindAttempt(key.job, key.attempt));
  const int replicas = job->plannable->job.parallelism.data_parallel;
  if (key.replica >= static_cast<uint32_t>(replicas)) {
    return absl::InvalidArgumentError(
        absl::StrCat("key.replica: ", key.replica, " is not below ", replicas,
                     ", the replicas of job '", key.job, "'"));
  }
  return job;
}

uint64_t PlannerCore::ReadStep(const StepKey& key,
                               StepTable::ReadCallback done) {
  if (absl::Status status = CheckKey(key).status(); !status.ok()) {
    done(std::move(status));
    return 0;
  }
  return table_.Read(key, std::move(done));
}

void PlannerCore::CancelRead(const StepKey& key, uint64_t handle) {
  table_.CancelRead(key, handle);
}

void PlannerCore::NoteFetched(const StepKey& key, uint32_t rank) {
  table_.NoteFetched(key, rank);
}

StepResult PlannerCore::SealedStep(const StepKey& key) {
  PW_RETURN_IF_ERROR(CheckKey(key).status());
  return table_.Peek(key);
}

absl::Status PlannerCore::ReportStep(StepReportIn report) {
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const SealedPlan> sealed,
                      SealedStep(report.key));
  if (report.rank >= sealed->programs.size()) {
    return absl::OutOfRangeError(
        absl::StrCat("rank: ", report.rank, " is not below ",
                     sealed->programs.size(), ", the ranks of the job"));
  }
  if (report.plan_digest != sealed->plan_digest) {
    return absl::FailedPreconditionError(absl::StrCat(
        "plan_digest: ", absl::BytesToHexString(report.plan_digest),
        " is not the sealed plan's ",
        absl::BytesToHexString(sealed->plan_digest)));
  }
  const int64_t actions =
      static_cast<int64_t>(sealed->plan->programs.ranks[report.rank].size());
  const auto durations = static_cast<int64_t>(report.duration_ns.size());
  if (report.num_start_offsets != durations ||
      (durations != 0 && durations != actions)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "start_offset_ns and duration_ns: ", report.num_start_offsets, " and ",
        durations, " values, must be one for each of the ", actions,
        " actions of the rank's program, or none"));
  }
  for (int64_t i = 0; i < durations; ++i) {
    PW_RETURN_IF_ERROR(CheckMost(absl::StrCat("duration_ns[", i, "]"),
                                 report.duration_ns[i], kMaxReportedNs));
  }
  if (report.step_ns == 0) {
    return absl::InvalidArgumentError("step_ns: 0, must be above 0");
  }
  PW_RETURN_IF_ERROR(CheckMost("step_ns", report.step_ns, kMaxReportedNs));
  PW_RETURN_IF_ERROR(
      CheckMost("peak_memory_bytes", report.peak_memory_bytes,
                static_cast<uint64_t>(sealed->job->job.device.memory_bytes)));
  if (!table_.NoteReported(report.key, report.rank)) return absl::OkStatus();
  const int64_t predicted_ns = sealed->plan->report.makespan_ns;
  if (report.rank == 0 && predicted_ns > 0) {
    const double ratio =
        static_cast<double>(report.step_ns) / static_cast<double>(predicted_ns);
    registry_.CountReport(report.key.job, ratio);
    if (observer_ != nullptr) observer_->OnReport(report.key.job, ratio);
  }
  // Nobody executes a shadow step's programs.
  if (sealed->shadow) return absl::OkStatus();
  const std::string job = report.key.job;
  RunLearning(job, [this, sealed,
                    report = std::move(report)](const absl::Status& status) {
    if (status.ok()) Learn(*sealed, report);
  });
  return absl::OkStatus();
}

void PlannerCore::Learn(const SealedPlan& sealed, const StepReportIn& report) {
  const auto job = registry_.Find(report.key.job);
  if (!job.ok() || (*job)->attempt != report.key.attempt) return;
  JobCosts& costs = *(*job)->costs;
  const search::StepReport& predicted = sealed.plan->report;
  if (report.rank == 0 && predicted.makespan_ns > 0) {
    const JobCosts::DriftState state = costs.ObserveStep(
        report.key.replica, static_cast<int64_t>(report.key.step),
        predicted.makespan_ns, static_cast<int64_t>(report.step_ns));
    if (observer_ != nullptr && (state.drift || state.changed)) {
      observer_->OnDrift(report.key, state);
    }
  }
  if (report.peak_memory_bytes > 0) {
    const std::vector<int64_t>& extra = sealed.job->extra_reserve_bytes;
    costs.AddPeak(report.key.replica, static_cast<int>(report.rank),
                  predicted.peak_memory_bytes[report.rank] -
                      (extra.empty() ? 0 : extra[report.rank]),
                  static_cast<int64_t>(report.peak_memory_bytes));
  }
  if (!report.duration_ns.empty()) {
    const std::vector<int64_t> duration_ns(report.duration_ns.begin(),
                                           report.duration_ns.end());
    costs.AddObservations(
        *sealed.costs, static_cast<int64_t>(report.key.step),
        search::ObserveCosts(*sealed.job, *sealed.plan,
                             static_cast<int>(report.rank), duration_ns,
                             sealed.costs->costs->measured(),
                             costs.observations_per_report(),
                             static_cast<int64_t>(report.key.step)));
  }
  RepriceIfDue(*job);
}

absl::Status PlannerCore::AddMeasuredLayers(
    absl::string_view name, const std::vector<semu::MeasuredLayer>& layers) {
  PW_ASSIGN_OR_RETURN(const std::shared_ptr<const RegisteredJob> job,
                      registry_.Find(name));
  job->costs->AddLayers(layers);
  RepriceIfDue(job);
  return absl::OkStatus();
}

void PlannerCore::RepriceIfDue(
    const std::shared_ptr<const RegisteredJob>& job) {
  if (!job->costs->TakeDue(*job->cost_version)) return;
  RunLearning(job->name, [this, job](const absl::Status& status) {
    const bool priced = status.ok() && Reprice(job->name);
    job->costs->EndPricing();
    if (!priced) return;
    // Meanwhile more was learnt, or another layout registered.
    const auto next = registry_.Find(job->name);
    if (next.ok()) RepriceIfDue(*next);
  });
}

bool PlannerCore::Reprice(const std::string& name) {
  const auto job = registry_.Find(name);
  if (!job.ok()) return true;
  PreparedJob prepared;
  prepared.costs = (*job)->costs;
  prepared.cost_version = prepared.costs->Publish(*(*job)->cost_version);
  if (prepared.cost_version == nullptr) return true;
  const auto prepare = [&] {
    return planner_->Prepare((*job)->plannable->job, (*job)->plannable->layout,
                             prepared.cost_version->Prepare());
  };
  auto plannable = prepare();
  if (!plannable.ok() && observer_ != nullptr) {
    observer_->OnCostsRefused(name, plannable.status());
  }
  while (!plannable.ok()) {
    // Without the reserve that is too large, the rest of what was learnt
    // counts.
    prepared.cost_version =
        prepared.costs->RefuseReserve((*job)->plannable->extra_reserve_bytes);
    if (prepared.cost_version == nullptr) return false;
    plannable = prepare();
  }
  const std::shared_ptr<const CostVersion> version = prepared.cost_version;
  prepared.plannable = *std::move(plannable);
  prepared.layout_digest = (*job)->layout_digest;
  prepared.profile_digest = codec_->ProfileDigest(*prepared.plannable);
  MutexLock lock(&lifecycle_mutex_);
  if (registry_.Reprice(name, std::move(prepared)) && observer_ != nullptr) {
    observer_->OnCosts(name, *version, /*is_new=*/true);
  }
  return true;
}

std::shared_ptr<search::WorkerPool> PlannerCore::TakeWorkers(int threads) {
  std::unique_ptr<search::WorkerPool> workers;
  {
    MutexLock lock(&workers_mutex_);
    if (idle_workers_ != nullptr && idle_workers_->threads() == threads) {
      workers = std::move(idle_workers_);
    }
  }
  if (workers == nullptr) {
    workers = std::make_unique<search::WorkerPool>(threads);
  }
  return {workers.release(), [this](search::WorkerPool* used) {
            // What is given up ends when the lock is free again.
            std::unique_ptr<search::WorkerPool> idle(used);
            MutexLock lock(&workers_mutex_);
            idle_workers_.swap(idle);
          }};
}

int PlannerCore::ThreadsForSearch() const {
  const PlanningPool::Load load = pool_.load();
  return std::max(1, pool_.threads() / std::max(1, load.running + load.queued));
}

int PlannerCore::ThreadsForQuestion() const {
  const PlanningPool::Load steps = pool_.load();
  const PlanningPool::Load questions = questions_.load();
  return std::max(1, pool_.threads() /
                         std::max(1, steps.running + steps.queued +
                                         questions.running + questions.queued));
}

std::shared_ptr<const SealedPlan> PlannerCore::LikeBatch(
    const StepRequest& request) {
  auto like = table_.Like(request, request.job->profile_digest);
  if (observer_ != nullptr) observer_->OnLikeBatchLookup(like != nullptr);
  return like;
}

std::chrono::nanoseconds PlannerCore::SealTime(
    const std::string& job, Clock::Duration until_sealed) const {
  const absl::StatusOr<JobStats> stats = registry_.Stats(job);
  if (stats.ok() && stats->seal_ns > 0) {
    return std::chrono::nanoseconds(stats->seal_ns);
  }
  return std::clamp<Clock::Duration>(until_sealed / 4, Clock::Duration::zero(),
                                     kFirstSealTime);
}

void PlannerCore::PlanStep(const std::shared_ptr<const PendingStep>& step) {
  const StepRequest& request = *step->request;
  const Clock::TimePoint started = clock_->Now();
  const bool time_budget = request.budget_evaluations == 0;

  // A step with a budget of evaluations starts cold, so that its plan depends
  // on the request alone.
  std::shared_ptr<const SealedPlan> warm;
  bool same_batch = false;
  if (time_budget) {
    warm = LikeBatch(request);
    same_batch = warm != nullptr;
    if (warm == nullptr) warm = table_.Latest(request);
  }

  search::PlanOptions options;
  options.search.seed = request.seed;
  options.search.threads = ThreadsForSearch();
  options.search.budget.evaluations = request.budget_evaluations;
  options.search.budget.cancelled = step->cancelled.get();
  if (same_batch) options.search.warm_start = &warm->plan->schedule;
  if (warm != nullptr) options.search.warm_settings = warm->plan->settings;
  Clock::TimePoint deadline =
      started + (time_budget ? options_.search_budget : options_.max_search);
  bool cut = !time_budget;
  if (request.seal_at.has_value()) {
    // The plan still has to be checked, lowered and serialised by then.
    const Clock::TimePoint needed =
        *request.seal_at -
        SealTime(request.key.job, *request.seal_at - started);
    if (needed < deadline) {
      deadline = needed;
      cut = true;
    }
  }
  options.search.budget.deadline = deadline;
  options.jitter.duration_noise = request.duration_noise;
  const auto workers = TakeWorkers(options.search.threads);
  options.search.pool = workers.get();

  auto plan = planner_->Plan(*request.job->plannable, request.batch, options);
  if (step->cancelled->load()) return;
  if (!plan.ok()) {
    SealFallback(*step, plan.status());
    return;
  }
  const PlanOrigin origin = plan->report.finished || !cut
                                ? PlanOrigin::kSearchFinished
                                : PlanOrigin::kSearchCut;
  const int64_t after_search_ns = plan->report.check_ns + plan->report.lower_ns;
  const Clock::TimePoint planned = clock_->Now();
  SealPlan(*step, *request.job,
           std::make_shared<search::StepPlan>(*std::move(plan)), origin,
           warm == nullptr ? std::string() : warm->plan_digest,
           /*joint=*/nullptr, Nanoseconds(started - request.submitted_at),
           workers.get());
  registry_.NoteSealTime(
      request.key.job, after_search_ns + Nanoseconds(clock_->Now() - planned));
}

void PlannerCore::PlanJointSteps(
    const std::vector<std::shared_ptr<const PendingStep>>& all,
    Clock::TimePoint queued_at) {
  std::vector<std::shared_ptr<const PendingStep>> steps;
  for (const auto& step : all) {
    if (!step->cancelled->load()) steps.push_back(step);
  }
  if (steps.empty()) return;
  std::sort(steps.begin(), steps.end(), [](const auto& a, const auto& b) {
    return a->request->key.replica < b->request->key.replica;
  });
  const Clock::TimePoint started = clock_->Now();
  const int count = static_cast<int>(steps.size());
  const std::string& job = steps[0]->request->key.job;

  search::PlanOptions options;
  search::SearchBudget& budget = options.search.budget;
  JointSearch joint;
  joint.queue_ns = Nanoseconds(started - queued_at);
  joint.seed = steps[0]->request->seed;
  options.search.seed = joint.seed;
  options.search.threads = ThreadsForSearch();
  const auto ended = std::make_shared<std::atomic<bool>>(false);
  std::vector<CancelFlag> wanted_by;
  wanted_by.reserve(steps.size());
  for (const auto& step : steps) wanted_by.push_back(step->cancelled);
  const Running running(this, std::move(wanted_by), ended);
  budget.cancelled = ended.get();
  std::vector<const semu::Batch*> batches;
  bool time_budget = false;
  std::optional<Clock::TimePoint> needed;
  for (const auto& step : steps) {
    const StepRequest& request = *step->request;
    batches.push_back(&request.batch);
    absl::StrAppend(&joint.batch_digests, request.batch_digest);
    budget.evaluations += request.budget_evaluations;
    time_budget |= request.budget_evaluations == 0;
    if (request.seal_at.has_value()) {
      // All plans are sealed one after the other.
      const Clock::TimePoint at =
          *request.seal_at -
          count * SealTime(job, (*request.seal_at - started) / count);
      needed = std::min(needed.value_or(at), at);
    }
  }
  if (time_budget) budget.evaluations = 0;
  joint.budget_evaluations = budget.evaluations;
  budget.deadline = started + (time_budget ? count * options_.search_budget
                                           : options_.max_search);
  bool cut = !time_budget;
  if (needed.has_value() && *needed < *budget.deadline) {
    budget.deadline = *needed;
    cut = true;
  }
  // What all are planned with, though a step may have come after a change.
  const RegisteredJob& registered = *steps[0]->request->job;
  const search::PlannableJob& plannable = *registered.plannable;
  std::optional<search::DealtBatches> dealt;
  if (MayMove(steps, plannable.job.parallelism.data_parallel)) {
    auto out = search::DealOut(plannable, batches);
    if (!out.ok()) {
      for (const auto& step : steps) SealFallback(*step, out.status());
      return;
    }
    dealt = *std::move(out);
  }
  if (dealt.has_value()) {
    for (int i = 0; i < count; ++i) batches[i] = &dealt->batches[i];
  }
  const auto workers = TakeWorkers(options.search.threads);
  options.search.pool = workers.get();
  std::vector<absl::StatusOr<search::StepPlan>> plans =
      search::PlanJointly(*planner_, plannable, batches, options);
  if (dealt.has_value()) {
    SealDealtSteps(steps, *dealt, registered, std::move(plans), cut, joint,
                   workers.get());
    return;
  }
  for (int i = 0; i < count; ++i) {
    const PendingStep& step = *steps[i];
    if (step.cancelled->load()) continue;
    if (!plans[i].ok()) {
      SealFallback(step, plans[i].status());
      continue;
    }
    const PlanOrigin origin = plans[i]->report.finished || !cut
                                  ? PlanOrigin::kSearchFinished
                                  : PlanOrigin::kSearchCut;
    const int64_t after_search_ns =
        plans[i]->report.check_ns + plans[i]->report.lower_ns;
    const Clock::TimePoint planned = clock_->Now();
    SealPlan(step, registered,
             std::make_shared<search::StepPlan>(*std::move(plans[i])), origin,
             /*warm_start_digest=*/"", &joint, joint.queue_ns, workers.get());
    registry_.NoteSealTime(
        job, after_search_ns + Nanoseconds(clock_->Now() - planned));
  }
}

PlanIdentity PlannerCore::IdentityOf(const StepRequest& request,
                                     const RegisteredJob& job,
                                     const JointSearch* joint) {
  PlanIdentity identity;
  identity.key = request.key;
  identity.job_digest = job.job_digest;
  identity.layout_digest = job.layout_digest;
  identity.batch_digest = request.batch_digest;
  identity.profile_digest = job.profile_digest;
  identity.seed = request.seed;
  identity.budget_evaluations = request.budget_evaluations;
  identity.duration_noise = request.duration_noise;
  if (joint != nullptr) {
    identity.joint_batch_digests = joint->batch_digests;
    identity.seed = joint->seed;
    identity.budget_evaluations = joint->budget_evaluations;
  }
  return identity;
}

void PlannerCore::SealDealtSteps(
    const std::vector<std::shared_ptr<const PendingStep>>& steps,
    const search::DealtBatches& dealt, const RegisteredJob& job,
    std::vector<absl::StatusOr<search::StepPlan>> plans, bool cut,
    const JointSearch& joint, search::WorkerPool* workers) {
  const Clock::TimePoint planned = clock_->Now();
  int64_t after_search_ns = 0;
  const auto fall_back = [&](const absl::Status& status) {
    for (const auto& step : steps) SealFallback(*step, status);
  };
  std::vector<UnsealedPlan> unsealed;
  for (size_t i = 0; i < steps.size(); ++i) {
    if (!plans[i].ok()) return fall_back(plans[i].status());
    const StepRequest& request = *steps[i]->request;
    after_search_ns += plans[i]->report.check_ns + plans[i]->report.lower_ns;
    UnsealedPlan& plan = unsealed.emplace_back();
    plan.identity = IdentityOf(request, job, &joint);
    plan.identity.origin = plans[i]->report.finished || !cut
                               ? PlanOrigin::kSearchFinished
                               : PlanOrigin::kSearchCut;
    plan.timings.queue_ns = joint.queue_ns;
    plan.timings.submit_to_seal_ns =
        Nanoseconds(clock_->Now() - request.submitted_at);
    plan.plan = std::make_shared<search::StepPlan>(*std::move(plans[i]));
  }
  auto sealed = codec_->SealDealt(*job.plannable, dealt, unsealed, workers);
  if (!sealed.ok()) return fall_back(sealed.status());
  std::vector<std::shared_ptr<const SealedPlan>> values;
  for (size_t i = 0; i < steps.size(); ++i) {
    SealedPlan& value = (*sealed)[i];
    value.shadow = steps[i]->request->shadow;
    value.forward_only = steps[i]->request->batch.forward_only;
    value.job = job.plannable;
    value.costs = job.cost_version;
    values.push_back(std::make_shared<const SealedPlan>(std::move(value)));
  }
  const auto count = [&] {
    for (size_t i = 0; i < steps.size(); ++i) {
      registry_.CountPlan(job.name, values[i]->identity.origin);
      if (observer_ != nullptr) {
        observer_->OnPlanSealed(*values[i], unsealed[i].timings);
      }
    }
  };
  registry_.NoteSealTime(
      job.name, (after_search_ns + Nanoseconds(clock_->Now() - planned)) /
                    static_cast<int64_t>(steps.size()));
  if (!table_.SealAll(steps, values, clock_->Now(), count)) {
    return fall_back(absl::OkStatus());
  }
  WakeKeeper();
}

void PlannerCore::SealPlan(const PendingStep& step, const RegisteredJob& job,
                           std::shared_ptr<const search::StepPlan> plan,
                           PlanOrigin origin, std::string warm_start_digest,
                           const JointSearch* joint,
                           std::optional<int64_t> queue_ns,
                           search::WorkerPool* workers) {
  const StepRequest& request = *step.request;
  PlanIdentity identity = IdentityOf(request, job, joint);
  identity.warm_start_digest = std::move(warm_start_digest);
  identity.origin = origin;
  PlanTimings timings;
  timings.queue_ns = queue_ns;
  timings.submit_to_seal_ns = Nanoseconds(clock_->Now() - request.submitted_at);
  absl::StatusOr<SealedPlan> sealed =
      codec_->Seal(*job.plannable, std::move(plan), identity, timings, workers);
  if (!sealed.ok()) {
    SealFailure(step, sealed.status());
    return;
  }
  sealed->shadow = request.shadow;
  sealed->forward_only = request.batch.forward_only;
  sealed->job = job.plannable;
  sealed->costs = job.cost_version;
  auto value = std::make_shared<const SealedPlan>(*std::move(sealed));
  const auto count = [&] {
    registry_.CountPlan(request.key.job, origin);
    if (observer_ != nullptr) observer_->OnPlanSealed(*value, timings);
  };
  if (table_.Seal(step, value, clock_->Now(), count)) WakeKeeper();
}

void PlannerCore::SealFailure(const PendingStep& step,
                              const absl::Status& status) {
  const auto count = [&] {
    if (observer_ != nullptr) {
      observer_->OnStepFailed(step.request->key, status);
    }
  };
  if (table_.Seal(step, status, clock_->Now(), count)) WakeKeeper();
}

void PlannerCore::SealFallback(const PendingStep& step,
                               const absl::Status& why_no_search) {
  const StepRequest& request = *step.request;
  if (auto like = LikeBatch(request); like != nullptr) {
    SealPlan(step, *request.job, like->plan, PlanOrigin::kCached,
             like->plan_digest, /*joint=*/nullptr, /*queue_ns=*/std::nullopt,
             /*workers=*/nullptr);
    return;
  }
  auto safe = planner_->PlanSafe(*request.job->plannable, request.batch);
  if (!safe.ok()) {
    SealFailure(step, why_no_search.ok() ? safe.status() : why_no_search);
    return;
  }
  SealPlan(step, *request.job,
           std::make_shared<search::StepPlan>(*std::move(safe)),
           PlanOrigin::kSafe, std::string(), /*joint=*/nullptr,
           /*queue_ns=*/std::nullopt, /*workers=*/nullptr);
}

void PlannerCore::EnqueueFallback(
    const std::shared_ptr<const PendingStep>& step) {
  PlanningPool::Task task;
  task.job = step->request->key.job;
  task.needed_at = *step->request->seal_at;
  task.cancelled = step->cancelled;
  task.run = [this, step](bool dropped) {
    if (dropped || step->cancelled->load()) return;
    SealFallback(*step, absl::OkStatus());
    DropCancelled();
  };
  // At a stop the steps that wait are answered already (AbandonPending).
  if (!fallbacks_.Reserve()) return;
  fallbacks_.Enqueue(std::move(task));
}

void PlannerCore::DiscardLater(StepResult replaced) {
  if (!replaced.ok() || *replaced == nullptr) return;
  MutexLock lock(&keeper_mutex_);
  discarded_.push_back({clock_->Now() + kDiscardAfter, *std::move(replaced)});
  if (discarded_.size() > 1) return;  // the keeper wakes up for the first
  keeper_woken_ = true;
  keeper_wake_.NotifyAll();
}

void PlannerCore::WakeKeeper() {
  MutexLock lock(&keeper_mutex_);
  keeper_woken_ = true;
  keeper_wake_.NotifyAll();
}

void PlannerCore::DropUnusedJobs(Clock::TimePoint now) {
  bool removed = false;
  {
    MutexLock lock(&lifecycle_mutex_);
    for (const std::string& job : registry_.Unused(now - options_.job_ttl)) {
      // Its plans may still be needed.
      if (table_.HeldSteps(job) > 0) {
        registry_.NoteUsed(job, now);
        continue;
      }
      removed = registry_.Remove(job).ok() || removed;
      table_.EndJob(job);
      if (observer_ != nullptr) observer_->OnJobRemoved(job, /*unused=*/true);
    }
  }
  if (removed) DropCancelled();
}

void PlannerCore::KeepDeadlines() {
  while (true) {
    std::optional<Clock::TimePoint> next = table_.NextEvent();
    if (const auto used = registry_.LeastUsed(); used.has_value()) {
      const Clock::TimePoint unused = *used + options_.job_ttl;
      next = std::min(next.value_or(unused), unused);
    }
    if (const auto joint = NextJointStart(); joint.has_value()) {
      next = std::min(next.value_or(*joint), *joint);
    }
    std::shared_ptr<const SealedPlan> discarded;  // freed without the lock
    {
      MutexLock lock(&keeper_mutex_);
      if (!discarded_.empty()) {
        const Clock::TimePoint first = discarded_.front().at;
        next = std::min(next.value_or(first), first);
      }
      while (!keeper_stopped_ && !keeper_woken_ &&
             !(next.has_value() && clock_->Now() >= *next)) {
        clock_->Wait(&keeper_mutex_, &keeper_wake_, next);
      }
      if (keeper_stopped_) return;
      keeper_woken_ = false;
      // One at a time: deadlines do not wait for several.
      if (!discarded_.empty() && discarded_.front().at <= clock_->Now()) {
        discarded = std::move(discarded_.front().plan);
        discarded_.pop_front();
      }
    }
    const Clock::TimePoint now = clock_->Now();
    for (JointSteps& joint : TakeJointDue(now)) {
      EnqueueJointly(std::move(joint));
    }
    const auto due = table_.TakeDue(now);
    for (const auto& step : due) EnqueueFallback(step);
    table_.DropExpired(now);
    DropUnusedJobs(now);
  }
}

// The outcomes of one comparison, filled by its tasks; the last one answers.
struct PlannerCore::Comparison {
  std::shared_ptr<const RegisteredJob> job;
  semu::Batch batch;
  search::PlanOptions options;
  Clock::TimePoint deadline;
  CancelFlag cancelled;
  // Set once it is cancelled, or the core stops.
  const CancelFlag end = std::make_shared<std::atomic<bool>>(false);
  CompareCallback done;

  Mutex mutex;
  std::vector<StrategyOutcome> outcomes ABSL_GUARDED_BY(mutex);
  int left ABSL_GUARDED_BY(mutex) = 0;
  bool dropped ABSL_GUARDED_BY(mutex) = false;  // a task of it was
};

void PlannerCore::CompareStrategies(std::shared_ptr<const RegisteredJob> job,
                                    semu::Batch batch,
                                    std::vector<std::string> strategies,
                                    uint64_t seed, int64_t budget_evaluations,
                                    Clock::TimePoint deadline,
                                    CancelFlag cancelled,
                                    CompareCallback done) {
  strategies.insert(strategies.begin(), std::string());  // the planner's own
  const int count = static_cast<int>(strategies.size());
  if (!questions_.Reserve(count)) {
    done(QueueFull());
    return;
  }
  auto comparison = std::make_shared<Comparison>();
  comparison->job = std::move(job);
  comparison->batch = std::move(batch);
  comparison->options.search.seed = seed;
  comparison->options.search.budget.evaluations = budget_evaluations;
  comparison->options.search.budget.cancelled = comparison->end.get();
  comparison->deadline = deadline;
  comparison->cancelled = std::move(cancelled);
  comparison->done = std::move(done);
  {
    MutexLock lock(&comparison->mutex);
    comparison->left = count;
    for (const std::string& strategy : strategies) {
      comparison->outcomes.push_back(
          {strategy.empty() ? "planner" : strategy,
           absl::CancelledError("not planned: the call was cancelled")});
    }
  }
  for (int i = 0; i < count; ++i) {
    PlanningPool::Task task;
    task.job = comparison->job->name;
    task.cancelled = comparison->cancelled;
    task.run = [this, comparison, i, strategy = strategies[i]](bool dropped) {
      absl::StatusOr<search::StepReport> report =
          absl::CancelledError("not planned: the call was cancelled");
      if (!dropped) {
        const Running running(this, {comparison->cancelled}, comparison->end);
        search::PlanOptions options = comparison->options;
        options.strategy = strategy;
        options.search.threads = ThreadsForQuestion();
        options.search.budget.deadline =
            std::min(comparison->deadline,
                     clock_->Now() + (options.search.budget.evaluations == 0
                                          ? options_.search_budget
                                          : options_.max_search));
        auto plan = planner_->Plan(*comparison->job->plannable,
                                   comparison->batch, options);
        if (plan.ok()) {
          report = std::move(plan->report);
        } else {
          report = plan.status();
        }
      }
      std::vector<StrategyOutcome> outcomes;
      bool any_dropped = false;
      {
        MutexLock lock(&comparison->mutex);
        comparison->outcomes[i].report = std::move(report);
        comparison->dropped = comparison->dropped || dropped;
        if (--comparison->left > 0) return;
        outcomes = std::move(comparison->outcomes);
        any_dropped = comparison->dropped;
      }
      if (comparison->cancelled->load()) {
        comparison->done(absl::CancelledError("the call was cancelled"));
      } else if (any_dropped || comparison->end->load()) {
        comparison->done(absl::UnavailableError("the server shuts down"));
      } else {
        comparison->done(std::move(outcomes));
      }
    };
    questions_.Enqueue(std::move(task));
  }
}

}  // namespace pipeweaver::server
