// See job_registry.h.

#include "server/job_registry.h"

#include <algorithm>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::server {
namespace {

// Starts of one run whose request ids are remembered.
constexpr size_t kRequestIdsKept = 16;

absl::Status NotRegistered(absl::string_view name) {
  return absl::NotFoundError(
      absl::StrCat("job: '", name, "' is not registered"));
}

absl::Status OverAttempt(absl::string_view name, uint64_t attempt,
                         const RegisteredJob& latest) {
  return absl::AbortedError(
      absl::StrCat("attempt: ", attempt, " of job '", name,
                   "' is over, the latest is ", latest.attempt,
                   attempt == latest.attempt ? ", of another request_id" : ""));
}

std::string Hex(absl::string_view digest) {
  return absl::BytesToHexString(digest);
}

}  // namespace

absl::StatusOr<std::optional<std::shared_ptr<const RegisteredJob>>>
JobRegistry::TryRegister(const Registration& registration) {
  MutexLock lock(&mutex_);
  return TryRegisterLocked(registration);
}

absl::StatusOr<std::optional<std::shared_ptr<const RegisteredJob>>>
JobRegistry::TryRegisterLocked(const Registration& registration) {
  const std::string& name = registration.job.name;
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) {
    if (jobs_.size() >= static_cast<size_t>(max_jobs_)) {
      return absl::ResourceExhaustedError(
          absl::StrCat("job.name: '", name, "' is new, and the server holds ",
                       max_jobs_, " jobs, its limit (max_jobs)"));
    }
    return std::nullopt;
  }
  Entry& entry = it->second;
  const RegisteredJob& job = *entry.job;
  if (job.job_digest != registration.job_digest) {
    return absl::AlreadyExistsError(absl::StrCat(
        "job.name: '", name, "' is registered with job digest ",
        Hex(job.job_digest), ", not ", Hex(registration.job_digest),
        ": remove that job or choose another name"));
  }
  if (registration.attempt != 0 &&
      (registration.attempt < job.attempt ||
       (registration.attempt == job.attempt &&
        registration.request_id != job.request_id))) {
    return OverAttempt(name, registration.attempt, job);
  }
  for (const auto& [request_id, answer] : entry.answered) {
    if (registration.attempt <= job.attempt &&
        request_id == registration.request_id) {
      RegisteredJob same = *answer;
      same.layout_confirmed =
          same.layout_confirmed ||
          (job.layout_confirmed && job.layout_digest == same.layout_digest);
      return std::make_shared<const RegisteredJob>(std::move(same));
    }
  }
  if (registration.pinned.has_value() &&
      registration.pinned_digest != job.layout_digest) {
    return std::nullopt;  // a new layout for a known job
  }
  RegisteredJob next = job;
  next.attempt = NextAttempt(job.attempt, registration);
  next.layout_confirmed =
      next.layout_confirmed || registration.pinned.has_value();
  return Answer(entry, registration, std::move(next));
}

absl::StatusOr<std::shared_ptr<const RegisteredJob>> JobRegistry::Commit(
    const Registration& registration, PreparedJob prepared) {
  MutexLock lock(&mutex_);
  PW_ASSIGN_OR_RETURN(
      std::optional<std::shared_ptr<const RegisteredJob>> answered,
      TryRegisterLocked(registration));
  if (answered.has_value()) return *std::move(answered);
  const std::string& name = registration.job.name;
  const auto it = jobs_.find(name);
  RegisteredJob job;
  job.name = name;
  job.job_bytes = registration.job_bytes;
  job.job_digest = registration.job_digest;
  job.layout_digest = std::move(prepared.layout_digest);
  job.attempt = NextAttempt(it == jobs_.end() ? 0 : it->second.job->attempt,
                            registration);
  job.layout_confirmed = registration.pinned.has_value();
  job.plannable = std::move(prepared.plannable);
  job.profile_digest = std::move(prepared.profile_digest);
  job.cost_version = std::move(prepared.cost_version);
  job.costs = std::move(prepared.costs);
  Entry& entry = it == jobs_.end() ? jobs_[name] : it->second;
  return Answer(entry, registration, std::move(job));
}

bool JobRegistry::Reprice(absl::string_view name, PreparedJob prepared) {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) return false;
  const RegisteredJob& job = *it->second.job;
  if (job.costs != prepared.costs ||
      job.layout_digest != prepared.layout_digest ||
      job.cost_version->number >= prepared.cost_version->number) {
    return false;
  }
  RegisteredJob repriced = job;
  repriced.plannable = std::move(prepared.plannable);
  repriced.profile_digest = std::move(prepared.profile_digest);
  repriced.cost_version = std::move(prepared.cost_version);
  it->second.job = std::make_shared<const RegisteredJob>(std::move(repriced));
  return true;
}

uint64_t JobRegistry::NextAttempt(uint64_t latest,
                                  const Registration& registration) const {
  return registration.attempt > latest ? registration.attempt
                                       : std::max(latest, attempts_before_) + 1;
}

std::shared_ptr<const RegisteredJob> JobRegistry::Answer(
    Entry& entry, const Registration& registration, RegisteredJob job) {
  job.request_id = registration.request_id;
  if (job.attempt != registration.attempt) entry.handed_out = job.attempt;
  entry.job = std::make_shared<const RegisteredJob>(std::move(job));
  entry.answered.emplace_back(registration.request_id, entry.job);
  if (entry.answered.size() > kRequestIdsKept) entry.answered.pop_front();
  return entry.job;
}

absl::Status JobRegistry::ConfirmLayout(absl::string_view name,
                                        uint64_t attempt,
                                        absl::string_view layout_digest) {
  MutexLock lock(&mutex_);
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const RegisteredJob> job,
                      FindAttemptLocked(name, attempt));
  if (job->layout_digest != layout_digest) {
    return absl::FailedPreconditionError(absl::StrCat(
        "layout_digest: ", Hex(layout_digest), " is not the proposed layout's ",
        Hex(job->layout_digest)));
  }
  if (job->layout_confirmed) return absl::OkStatus();
  RegisteredJob confirmed = *job;
  confirmed.layout_confirmed = true;
  jobs_.find(name)->second.job =
      std::make_shared<const RegisteredJob>(std::move(confirmed));
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<const RegisteredJob>> JobRegistry::Find(
    absl::string_view name) const {
  MutexLock lock(&mutex_);
  return FindLocked(name);
}

absl::StatusOr<std::shared_ptr<const RegisteredJob>> JobRegistry::FindAttempt(
    absl::string_view name, uint64_t attempt) const {
  MutexLock lock(&mutex_);
  return FindAttemptLocked(name, attempt);
}

absl::StatusOr<std::shared_ptr<const RegisteredJob>> JobRegistry::FindLocked(
    absl::string_view name) const {
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) return NotRegistered(name);
  return it->second.job;
}

absl::StatusOr<std::shared_ptr<const RegisteredJob>>
JobRegistry::FindAttemptLocked(absl::string_view name, uint64_t attempt) const {
  PW_ASSIGN_OR_RETURN(std::shared_ptr<const RegisteredJob> job,
                      FindLocked(name));
  if (attempt < job->attempt) return OverAttempt(name, attempt, *job);
  if (attempt > job->attempt) {
    return absl::NotFoundError(
        absl::StrCat("attempt: ", attempt, " of job '", name,
                     "' was not handed out, the latest is ", job->attempt,
                     ": register the job again"));
  }
  return job;
}

absl::Status JobRegistry::Remove(absl::string_view name) {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) return NotRegistered(name);
  attempts_before_ = std::max(attempts_before_, it->second.handed_out);
  jobs_.erase(it);
  return absl::OkStatus();
}

void JobRegistry::NoteUsed(absl::string_view name, Clock::TimePoint now) {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(name);
  if (it != jobs_.end()) it->second.used_at = now;
}

std::optional<Clock::TimePoint> JobRegistry::LeastUsed() const {
  MutexLock lock(&mutex_);
  std::optional<Clock::TimePoint> least;
  for (const auto& [name, entry] : jobs_) {
    least = std::min(least.value_or(entry.used_at), entry.used_at);
  }
  return least;
}

std::vector<std::string> JobRegistry::Unused(Clock::TimePoint time) const {
  MutexLock lock(&mutex_);
  std::vector<std::string> unused;
  for (const auto& [name, entry] : jobs_) {
    if (entry.used_at <= time) unused.push_back(name);
  }
  return unused;
}

std::vector<std::string> JobRegistry::Names() const {
  MutexLock lock(&mutex_);
  std::vector<std::string> names;
  names.reserve(jobs_.size());
  for (const auto& [name, entry] : jobs_) names.push_back(name);
  return names;
}

int JobRegistry::size() const {
  MutexLock lock(&mutex_);
  return static_cast<int>(jobs_.size());
}

absl::StatusOr<JobStats> JobRegistry::Stats(absl::string_view name) const {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) return NotRegistered(name);
  return it->second.stats;
}

void JobRegistry::CountPlan(absl::string_view name, PlanOrigin origin) {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) return;
  ++it->second.stats.plans_by_origin[static_cast<int>(origin)];
}

void JobRegistry::CountReport(absl::string_view name,
                              double measured_over_predicted) {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) return;
  JobStats& stats = it->second.stats;
  ++stats.reports;
  stats.measured_over_predicted +=
      (measured_over_predicted - stats.measured_over_predicted) /
      static_cast<double>(stats.reports);
}

void JobRegistry::NoteSealTime(absl::string_view name, int64_t seal_ns) {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(name);
  if (it == jobs_.end()) return;
  // Follows a rise at once and a fall slowly: sealing late costs the plan.
  int64_t& recent = it->second.stats.seal_ns;
  recent = std::max(seal_ns, recent - recent / 8);
}

}  // namespace pipeweaver::server
