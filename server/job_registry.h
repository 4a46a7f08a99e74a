// The jobs that the server plans for, and the attempts it handed out.

#ifndef SERVER_JOB_REGISTRY_H_
#define SERVER_JOB_REGISTRY_H_

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "search/planner.h"
#include "semu/base/mutex.h"
#include "semu/model/job.h"
#include "server/clock.h"
#include "server/job_costs.h"
#include "server/sealed_plan.h"

namespace pipeweaver::server {

// A job as it stands at one moment. Immutable: a change makes a new value.
struct RegisteredJob {
  std::string name;
  // Serialised v1.Job without its layout.
  std::string job_bytes;
  std::string job_digest;
  std::string layout_digest;
  uint64_t attempt = 0;
  std::string request_id;  // of the attempt
  bool layout_confirmed = false;
  std::shared_ptr<const search::PlannableJob> plannable;
  // Of the plans made with `plannable`, and the version of its costs.
  std::string profile_digest;
  std::shared_ptr<const CostVersion> cost_version;
  // Lives as long as the job, across its layouts and attempts; not null.
  std::shared_ptr<JobCosts> costs;
};

// A job made ready under a version of its costs.
struct PreparedJob {
  std::shared_ptr<const search::PlannableJob> plannable;
  std::string layout_digest;
  std::string profile_digest;
  std::shared_ptr<const CostVersion> cost_version;
  std::shared_ptr<JobCosts> costs;
};

// What a trainer registers, validated.
struct Registration {
  // Chosen by the caller, once for each start of the run.
  std::string request_id;
  // That the run has had; 0: none.
  uint64_t attempt = 0;
  std::string job_bytes;
  std::string job_digest;
  semu::Job job;
  // Layout pinned by the trainer, and its digest.
  std::optional<semu::Layout> pinned;
  std::string pinned_digest;
  // For whose steps a layout is proposed; empty: none were given.
  std::vector<semu::Batch> samples;
};

struct JobStats {
  // Plans sealed since registration; index is PlanOrigin.
  std::array<int64_t, kNumPlanOrigins> plans_by_origin{};
  int64_t reports = 0;
  // Mean of measured over predicted step time; 0 when none.
  double measured_over_predicted = 0;
  // Recent time from the end of a search to its sealed plan, nanoseconds.
  int64_t seal_ns = 0;
};

// New attempts of one name never repeat while the registry lives, not even
// after the job was removed; a run keeps its attempt (Registration::attempt)
// where the registry does not know it any more. Thread-safe.
class JobRegistry {
 public:
  // Holds at most `max_jobs` >= 1. New attempts are above `attempts_before`.
  explicit JobRegistry(int max_jobs, uint64_t attempts_before = 0)
      : max_jobs_(max_jobs), attempts_before_(attempts_before) {}

  // What can be answered without preparing the job: a request id seen before
  // (the same attempt again), or a job known with this layout (the run's
  // attempt, or else the next). nullopt: prepare the job and Commit.
  //
  // Errors: ALREADY_EXISTS when the name has another job digest; ABORTED when
  // the run's attempt is not above the latest, of another run;
  // RESOURCE_EXHAUSTED when the registry is full.
  absl::StatusOr<std::optional<std::shared_ptr<const RegisteredJob>>>
  TryRegister(const Registration& registration);

  // Registers what was prepared; nothing stays behind on an error. Somebody
  // else may have registered the name since TryRegister, so the same rules and
  // errors apply again.
  absl::StatusOr<std::shared_ptr<const RegisteredJob>> Commit(
      const Registration& registration, PreparedJob prepared);

  // Replaces a job's costs: steps submitted from now on are planned with them.
  // False, and nothing changes, when the job is gone, was registered anew, has
  // another layout, or has these costs or later ones.
  bool Reprice(absl::string_view name, PreparedJob prepared);

  // Errors: NOT_FOUND; ABORTED for an old attempt; FAILED_PRECONDITION when the
  // digest is not the proposed layout's.
  absl::Status ConfirmLayout(absl::string_view name, uint64_t attempt,
                             absl::string_view layout_digest);

  // Errors: NOT_FOUND.
  absl::StatusOr<std::shared_ptr<const RegisteredJob>> Find(
      absl::string_view name) const;

  // As Find, for a call of one attempt. Errors: NOT_FOUND also for an attempt
  // that was never handed out; ABORTED for an old one.
  absl::StatusOr<std::shared_ptr<const RegisteredJob>> FindAttempt(
      absl::string_view name, uint64_t attempt) const;

  // Errors: NOT_FOUND.
  absl::Status Remove(absl::string_view name);

  // The job is in use; does nothing for one that is gone.
  void NoteUsed(absl::string_view name, Clock::TimePoint now);
  // The least of the times at which jobs were last used.
  std::optional<Clock::TimePoint> LeastUsed() const;
  // The jobs that were not used after `time`.
  std::vector<std::string> Unused(Clock::TimePoint time) const;

  // In ascending order.
  std::vector<std::string> Names() const;
  int size() const;

  // Errors: NOT_FOUND.
  absl::StatusOr<JobStats> Stats(absl::string_view name) const;
  // These do nothing for a job that is gone.
  void CountPlan(absl::string_view name, PlanOrigin origin);
  void CountReport(absl::string_view name, double measured_over_predicted);
  void NoteSealTime(absl::string_view name, int64_t seal_ns);

 private:
  struct Entry {
    std::shared_ptr<const RegisteredJob> job;
    // The latest request ids and what they were answered, oldest first.
    std::deque<std::pair<std::string, std::shared_ptr<const RegisteredJob>>>
        answered;
    JobStats stats;
    Clock::TimePoint used_at;
    // Highest attempt that the registry counted up to.
    uint64_t handed_out = 0;
  };

  absl::StatusOr<std::optional<std::shared_ptr<const RegisteredJob>>>
  TryRegisterLocked(const Registration& registration)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<std::shared_ptr<const RegisteredJob>> FindLocked(
      absl::string_view name) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<std::shared_ptr<const RegisteredJob>> FindAttemptLocked(
      absl::string_view name, uint64_t attempt) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The attempt of a registration above `latest`.
  uint64_t NextAttempt(uint64_t latest, const Registration& registration) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static std::shared_ptr<const RegisteredJob> Answer(
      Entry& entry, const Registration& registration, RegisteredJob job);

  const int max_jobs_;
  mutable Mutex mutex_;
  std::map<std::string, Entry, std::less<>> jobs_ ABSL_GUARDED_BY(mutex_);
  // New attempts are above it: at least as high as any handed out to a job that
  // was removed.
  uint64_t attempts_before_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace pipeweaver::server

#endif  // SERVER_JOB_REGISTRY_H_
