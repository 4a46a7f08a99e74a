// The steps that the server holds: one plan a key, sealed once.

#ifndef SERVER_STEP_TABLE_H_
#define SERVER_STEP_TABLE_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "semu/base/mutex.h"
#include "semu/model/batch.h"
#include "server/clock.h"
#include "server/job_registry.h"
#include "server/planning_pool.h"
#include "server/sealed_plan.h"

namespace pipeweaver::server {

// A step to be planned. Immutable.
struct StepRequest {
  StepKey key;
  std::shared_ptr<const RegisteredJob> job;
  semu::Batch batch;
  std::string batch_digest;
  int64_t batch_bytes = 0;  // HeldBytes of the batch
  uint64_t seed = 0;
  int64_t budget_evaluations = 0;
  bool shadow = false;
  // Set: to be planned with the other replicas, waiting this long for them.
  std::optional<Clock::Duration> joint_wait;
  // Microbatches may be exchanged with the other replicas'.
  bool move_microbatches = false;
  // Of durations, to judge plans by; 0: none.
  double duration_noise = 0;
  Clock::TimePoint submitted_at;
  // When the step is sealed at the latest; nullopt: when its search ends.
  std::optional<Clock::TimePoint> seal_at;
};

// A step between its acceptance and its sealing.
struct PendingStep {
  std::shared_ptr<const StepRequest> request;
  // Set when a search for it is of no more use.
  CancelFlag cancelled;
};

// For each key the life is: submitted, then sealed (with a plan, or with the
// reason why there is none) or cancelled, then expired. Sealing happens once:
// whoever comes second is turned away, so that all reads get the same value.
// Reads change nothing. Steps of a replica lie in a window behind the latest
// one submitted; what has fallen out never comes back in the same attempt.
//
// Callbacks run on the thread whose call causes them, without a lock held.
// Thread-safe.
class StepTable {
 public:
  struct Options {
    // Steps of one replica held at once; a new step takes the place of the
    // oldest one that has been used (see NoteFetched).
    int max_steps_per_replica = 8;
    // Bytes of all sealed plans; the plan sealed first goes first. The batches
    // not yet sealed have as much again, and what is over is refused.
    int64_t max_plan_bytes = int64_t{1} << 30;
    // From sealing, or from seal_at where that is later, to expiry.
    Clock::Duration plan_ttl = std::chrono::seconds(600);
  };

  using ReadCallback = std::function<void(StepResult)>;

  struct Held {
    int steps = 0;
    int64_t plan_bytes = 0;
  };

  // `gave_way`, which may be null, is called with each step whose plan gave way
  // to others, as bytes were short, before it was used (see NoteFetched).
  explicit StepTable(const Options& options,
                     std::function<void(const StepKey&)> gave_way = nullptr)
      : options_(options), gave_way_(std::move(gave_way)) {}

  // Steps of this attempt are taken from now on; those of earlier attempts are
  // dropped, and calls that wait on them get ABORTED. False, and no change, if
  // it or a later one has begun already.
  bool BeginAttempt(const std::string& job, uint64_t attempt);
  // Drops the job; calls that wait on it get NOT_FOUND.
  void EndJob(const std::string& job);

  // Accepts a step. Returns what is to be planned, or null when the same batch
  // was accepted under this key before. What an older step held whose place
  // this one takes is handed over in `replaced`, as freeing it takes a while.
  //
  // Errors: NOT_FOUND (job), ABORTED (old attempt), ALREADY_EXISTS (the key has
  // another batch), OUT_OF_RANGE (behind the window), RESOURCE_EXHAUSTED
  // (window full, or too many bytes waiting).
  absl::StatusOr<std::shared_ptr<const PendingStep>> Submit(
      const std::shared_ptr<const StepRequest>& request,
      StepResult* replaced = nullptr);

  // Withdraws a step; calls that wait on it get NOT_FOUND. Errors: those of
  // NOT_FOUND and ABORTED as in Read; FAILED_PRECONDITION when it is sealed.
  absl::Status Cancel(const StepKey& key);

  // Seals the step with `result`, and sets `cancelled`; calls `gave_way` and
  // `sealed`, and after that back those who wait. False: it is sealed already,
  // or gone; then `result` is dropped.
  bool Seal(
      const PendingStep& step, StepResult result, Clock::TimePoint now,
      const std::function<void()>& sealed = [] {});

  // Seals several steps, or none of them: false where one is sealed already, or
  // gone. Else as Seal for each; `sealed` is called once.
  bool SealAll(
      const std::vector<std::shared_ptr<const PendingStep>>& steps,
      const std::vector<std::shared_ptr<const SealedPlan>>& plans,
      Clock::TimePoint now, const std::function<void()>& sealed = [] {});

  // Calls `done` once: now if the step is sealed or cannot be read, else when
  // it is. Returns a handle for CancelRead (0: `done` was called). Errors:
  // NOT_FOUND (job unknown, step not submitted, withdrawn or expired); ABORTED
  // (old attempt); whatever the step was sealed with.
  uint64_t Read(const StepKey& key, ReadCallback done);
  // What a read would get now. Errors also: FAILED_PRECONDITION when the step
  // is not sealed yet.
  StepResult Peek(const StepKey& key);
  // Calls a read that still waits back with CANCELLED. Nothing else changes.
  void CancelRead(const StepKey& key, uint64_t handle);

  // A rank has read its program to the end. A step counts as used when all
  // ranks have, or one reported times; steps that failed and shadow steps
  // always do.
  void NoteFetched(const StepKey& key, uint32_t rank);
  // True for the first report of a rank.
  bool NoteReported(const StepKey& key, uint32_t rank);

  // The latest plan of the replica, found by search, for this layout. Plans of
  // moved microbatches are not among these.
  std::shared_ptr<const SealedPlan> Latest(const StepRequest& request) const;
  // A plan, found by search, of a batch with the same metadata, for the same
  // job, layout and profile.
  std::shared_ptr<const SealedPlan> Like(
      const StepRequest& request, absl::string_view profile_digest) const;

  // The steps whose seal_at has come, earliest first, each returned once.
  std::vector<std::shared_ptr<const PendingStep>> TakeDue(Clock::TimePoint now);
  // Drops what has expired.
  void DropExpired(Clock::TimePoint now);
  // When TakeDue or DropExpired next has something to do.
  std::optional<Clock::TimePoint> NextEvent() const;

  // Answers all waiting reads with `status` and drops their steps.
  void AbandonPending(const absl::Status& status);

  Held held() const;
  int HeldSteps(const std::string& job) const;

 private:
  struct Entry {
    std::string batch_digest;
    bool shadow = false;
    // Not null until sealed.
    std::shared_ptr<const PendingStep> pending;
    std::optional<StepResult> result;
    int64_t bytes = 0;  // of the batch, then of the plan
    uint64_t seal_sequence = 0;
    Clock::TimePoint expires_at;
    std::vector<bool> fetched;   // [rank]
    std::vector<bool> reported;  // [rank]
    bool used = false;
    std::map<uint64_t, ReadCallback> waiting;
  };
  struct Replica {
    std::map<uint64_t, Entry> steps;
    // Steps below are gone for good.
    uint64_t floor = 0;
    // By forward_only; expired plans are forgotten.
    std::array<std::weak_ptr<const SealedPlan>, 2> latest;
  };
  struct JobSteps {
    uint64_t attempt = 0;
    std::map<uint32_t, Replica> replicas;
  };
  // Callbacks to run once the lock is released.
  using Answers = std::vector<std::pair<ReadCallback, StepResult>>;

  static void Send(Answers&& answers);

  absl::StatusOr<Replica*> FindReplica(const StepKey& key)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<Entry*> FindEntry(const StepKey& key)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Takes the entry's bytes, indices and waiting reads out; the caller erases
  // it.
  void Release(const StepKey& key, Entry& entry, const absl::Status& status,
               Answers* answers) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void ReleaseReplicas(const std::string& job, JobSteps& steps,
                       const absl::Status& status, Answers* answers)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The entry that waits to be sealed as `step`; null: it is sealed, or gone.
  Entry* FindPending(const PendingStep& step)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // REQUIRES: FindPending found `entry`.
  void SealEntry(const PendingStep& step, Entry& entry, StepResult result,
                 Clock::TimePoint now, Answers* answers)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Expires sealed steps while they hold more than max_plan_bytes: first those
  // that are used, then those of the job that holds most; the oldest of them.
  // Returns those that were not used.
  std::vector<StepKey> MakeRoom(Answers* answers)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void TellGaveWay(const std::vector<StepKey>& steps) const;
  // Expires a sealed step.
  void Expire(const StepKey& expired, Answers* answers)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static std::string LikeKey(absl::string_view job, absl::string_view layout,
                             absl::string_view batch,
                             absl::string_view profile);

  const Options options_;
  const std::function<void(const StepKey&)> gave_way_;
  mutable Mutex mutex_;
  std::map<std::string, JobSteps> jobs_ ABSL_GUARDED_BY(mutex_);
  std::set<std::pair<Clock::TimePoint, StepKey>> due_ ABSL_GUARDED_BY(mutex_);
  std::map<uint64_t, StepKey> sealed_ ABSL_GUARDED_BY(mutex_);
  std::set<std::pair<Clock::TimePoint, StepKey>> expiries_
      ABSL_GUARDED_BY(mutex_);
  std::map<std::string, std::shared_ptr<const SealedPlan>> like_
      ABSL_GUARDED_BY(mutex_);
  int num_steps_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t batch_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t plan_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  uint64_t next_handle_ ABSL_GUARDED_BY(mutex_) = 1;
  uint64_t next_seal_ ABSL_GUARDED_BY(mutex_) = 1;
};

}  // namespace pipeweaver::server

#endif  // SERVER_STEP_TABLE_H_
