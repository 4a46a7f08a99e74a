// See step_table.h.

#include "server/step_table.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::server {
namespace {

absl::Status Expired(const StepKey& key) {
  return absl::NotFoundError(absl::StrCat("step: ", key.step, " of job '",
                                          key.job, "', replica ", key.replica,
                                          " has expired"));
}

bool FoundBySearch(PlanOrigin origin) {
  return origin == PlanOrigin::kSearchFinished ||
         origin == PlanOrigin::kSearchCut;
}

}  // namespace

void StepTable::Send(Answers&& answers) {
  for (auto& [callback, result] : answers) callback(std::move(result));
}

std::string StepTable::LikeKey(absl::string_view job, absl::string_view layout,
                               absl::string_view batch,
                               absl::string_view profile) {
  // Digests have one length, so that their concatenation is unambiguous.
  return absl::StrCat(job, layout, batch, profile);
}

absl::StatusOr<StepTable::Replica*> StepTable::FindReplica(const StepKey& key) {
  const auto job = jobs_.find(key.job);
  if (job == jobs_.end()) {
    return absl::NotFoundError(
        absl::StrCat("job: '", key.job, "' is not registered"));
  }
  if (key.attempt != job->second.attempt) {
    const std::string which =
        absl::StrCat("attempt: ", key.attempt, " of job '", key.job, "'");
    if (key.attempt < job->second.attempt) {
      return absl::AbortedError(
          absl::StrCat(which, " is over, the latest is ", job->second.attempt));
    }
    return absl::NotFoundError(
        absl::StrCat(which, " was not handed out, the latest is ",
                     job->second.attempt, ": register the job again"));
  }
  return &job->second.replicas[key.replica];
}

absl::StatusOr<StepTable::Entry*> StepTable::FindEntry(const StepKey& key) {
  PW_ASSIGN_OR_RETURN(Replica * replica, FindReplica(key));
  const auto it = replica->steps.find(key.step);
  if (it != replica->steps.end()) return &it->second;
  if (key.step < replica->floor) return Expired(key);
  return absl::NotFoundError(absl::StrCat("step: ", key.step, " of job '",
                                          key.job, "', replica ", key.replica,
                                          " was not submitted, or was "
                                          "withdrawn"));
}

void StepTable::Release(const StepKey& key, Entry& entry,
                        const absl::Status& status, Answers* answers) {
  --num_steps_;
  if (entry.pending != nullptr) {
    entry.pending->cancelled->store(true);
    batch_bytes_ -= entry.bytes;
    if (entry.pending->request->seal_at.has_value()) {
      due_.erase({*entry.pending->request->seal_at, key});
    }
  } else {
    plan_bytes_ -= entry.bytes;
    sealed_.erase(entry.seal_sequence);
    expiries_.erase({entry.expires_at, key});
    if (entry.result->ok()) {
      const SealedPlan& sealed = ***entry.result;
      const PlanIdentity& identity = sealed.identity;
      const auto like =
          like_.find(LikeKey(identity.job_digest, identity.layout_digest,
                             identity.batch_digest, identity.profile_digest));
      if (like != like_.end() && like->second.get() == &sealed) {
        like_.erase(like);
      }
    }
  }
  for (auto& [handle, callback] : entry.waiting) {
    answers->emplace_back(std::move(callback), status);
  }
}

void StepTable::ReleaseReplicas(const std::string& job, JobSteps& steps,
                                const absl::Status& status, Answers* answers) {
  for (auto& [index, replica] : steps.replicas) {
    for (auto& [step, entry] : replica.steps) {
      Release({job, steps.attempt, step, index}, entry, status, answers);
    }
  }
  steps.replicas.clear();
}

bool StepTable::BeginAttempt(const std::string& job, uint64_t attempt) {
  Answers answers;
  {
    MutexLock lock(&mutex_);
    JobSteps& steps = jobs_[job];
    if (attempt <= steps.attempt) return false;
    ReleaseReplicas(job, steps,
                    absl::AbortedError(absl::StrCat(
                        "attempt: ", steps.attempt, " of job '", job,
                        "' is over, the latest is ", attempt)),
                    &answers);
    steps.attempt = attempt;
  }
  Send(std::move(answers));
  return true;
}

void StepTable::EndJob(const std::string& job) {
  Answers answers;
  {
    MutexLock lock(&mutex_);
    const auto it = jobs_.find(job);
    if (it == jobs_.end()) return;
    ReleaseReplicas(
        job, it->second,
        absl::NotFoundError(absl::StrCat("job: '", job, "' was removed")),
        &answers);
    jobs_.erase(it);
  }
  Send(std::move(answers));
}

absl::StatusOr<std::shared_ptr<const PendingStep>> StepTable::Submit(
    const std::shared_ptr<const StepRequest>& request, StepResult* replaced) {
  const StepKey& key = request->key;
  MutexLock lock(&mutex_);
  PW_ASSIGN_OR_RETURN(Replica * replica, FindReplica(key));
  const auto same = replica->steps.find(key.step);
  if (same != replica->steps.end()) {
    if (same->second.batch_digest == request->batch_digest) return nullptr;
    return absl::AlreadyExistsError(absl::StrCat(
        "batch: ", DebugString(key), " was submitted with batch digest ",
        absl::BytesToHexString(same->second.batch_digest), ", not ",
        absl::BytesToHexString(request->batch_digest)));
  }
  if (key.step < replica->floor) {
    return absl::OutOfRangeError(absl::StrCat(
        "step: ", key.step, " of job '", key.job, "', replica ", key.replica,
        " has expired, the first that can be submitted is ", replica->floor,
        ": steps go back only with a new attempt"));
  }
  const uint64_t window = options_.max_steps_per_replica;
  if (!replica->steps.empty()) {
    const uint64_t latest = replica->steps.rbegin()->first;
    if (latest >= window && key.step <= latest - window) {
      return absl::OutOfRangeError(absl::StrCat(
          "step: ", key.step, " is ", latest - key.step, " behind step ",
          latest, " of job '", key.job, "', replica ", key.replica,
          ", a whole window of ", window,
          " or more: steps go back only with a new attempt"));
    }
  }
  if (batch_bytes_ + request->batch_bytes > options_.max_plan_bytes) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "batch: its ", request->batch_bytes, " bytes and the ", batch_bytes_,
        " of steps that wait to be planned exceed max_plan_bytes, ",
        options_.max_plan_bytes));
  }
  Answers answers;  // stays empty: nobody waits on a used step
  if (replica->steps.size() >= window) {
    // A sealed step a whole window behind could not be submitted any more:
    // ranks that have not read it went without.
    const auto used = std::find_if(
        replica->steps.begin(), replica->steps.end(), [&](const auto& item) {
          return item.second.used ||
                 (item.second.result.has_value() && key.step >= window &&
                  item.first <= key.step - window);
        });
    if (used == replica->steps.end() || used->first > key.step) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "step: job '", key.job, "', replica ", key.replica, " holds ",
          replica->steps.size(),
          " steps, the limit (max_steps_per_replica), and none before ",
          key.step,
          " was read by all ranks: read some, or cancel those not sealed"));
    }
    StepKey used_key = key;
    used_key.step = used->first;
    Release(used_key, used->second, Expired(used_key), &answers);
    if (replaced != nullptr) *replaced = *std::move(used->second.result);
    replica->floor = std::max(replica->floor, used->first + 1);
    replica->steps.erase(used);
  }
  PW_CHECK(answers.empty());
  Entry& entry = replica->steps[key.step];
  entry.batch_digest = request->batch_digest;
  entry.shadow = request->shadow;
  entry.bytes = request->batch_bytes;
  entry.pending = std::make_shared<const PendingStep>(
      PendingStep{request, std::make_shared<std::atomic<bool>>(false)});
  batch_bytes_ += entry.bytes;
  ++num_steps_;
  if (request->seal_at.has_value()) due_.insert({*request->seal_at, key});
  return entry.pending;
}

absl::Status StepTable::Cancel(const StepKey& key) {
  Answers answers;
  {
    MutexLock lock(&mutex_);
    PW_ASSIGN_OR_RETURN(Entry * entry, FindEntry(key));
    if (entry->pending == nullptr) {
      return absl::FailedPreconditionError(
          absl::StrCat("step: ", DebugString(key), " is sealed"));
    }
    Release(key, *entry,
            absl::NotFoundError(
                absl::StrCat("step: ", DebugString(key), " was withdrawn")),
            &answers);
    (*FindReplica(key))->steps.erase(key.step);
  }
  Send(std::move(answers));
  return absl::OkStatus();
}

StepTable::Entry* StepTable::FindPending(const PendingStep& step) {
  absl::StatusOr<Entry*> found = FindEntry(step.request->key);
  // The step may also have been withdrawn and submitted again.
  return found.ok() && (*found)->pending.get() == &step ? *found : nullptr;
}

void StepTable::SealEntry(const PendingStep& step, Entry& entry,
                          StepResult result, Clock::TimePoint now,
                          Answers* answers) {
  const StepKey& key = step.request->key;
  step.cancelled->store(true);
  if (step.request->seal_at.has_value()) {
    due_.erase({*step.request->seal_at, key});
  }
  batch_bytes_ -= entry.bytes;
  entry.bytes = 0;
  entry.used = entry.shadow || !result.ok();
  if (result.ok()) {
    const std::shared_ptr<const SealedPlan>& plan = *result;
    entry.bytes = HeldBytes(*plan);
    entry.fetched.assign(plan->programs.size(), false);
    entry.reported.assign(plan->programs.size(), false);
    if (FoundBySearch(plan->identity.origin) && !plan->moved) {
      const PlanIdentity& identity = plan->identity;
      like_[LikeKey(identity.job_digest, identity.layout_digest,
                    identity.batch_digest, identity.profile_digest)] = plan;
      (*FindReplica(key))->latest[plan->forward_only] = plan;
    }
  }
  plan_bytes_ += entry.bytes;
  entry.seal_sequence = next_seal_++;
  sealed_[entry.seal_sequence] = key;
  entry.expires_at =
      std::max(now, step.request->seal_at.value_or(now)) + options_.plan_ttl;
  expiries_.insert({entry.expires_at, key});
  for (auto& [handle, callback] : entry.waiting) {
    answers->emplace_back(std::move(callback), result);
  }
  entry.waiting.clear();
  entry.result = std::move(result);
  entry.pending = nullptr;
}

bool StepTable::Seal(const PendingStep& step, StepResult result,
                     Clock::TimePoint now,
                     const std::function<void()>& sealed) {
  Answers answers;
  std::vector<StepKey> unused;
  {
    MutexLock lock(&mutex_);
    Entry* entry = FindPending(step);
    if (entry == nullptr) return false;
    SealEntry(step, *entry, std::move(result), now, &answers);
    unused = MakeRoom(&answers);
  }
  TellGaveWay(unused);
  sealed();
  Send(std::move(answers));
  return true;
}

bool StepTable::SealAll(
    const std::vector<std::shared_ptr<const PendingStep>>& steps,
    const std::vector<std::shared_ptr<const SealedPlan>>& plans,
    Clock::TimePoint now, const std::function<void()>& sealed) {
  PW_CHECK(steps.size() == plans.size());
  Answers answers;
  std::vector<StepKey> unused;
  {
    MutexLock lock(&mutex_);
    for (const auto& step : steps) {
      if (FindPending(*step) == nullptr) return false;
    }
    for (size_t i = 0; i < steps.size(); ++i) {
      SealEntry(*steps[i], *FindPending(*steps[i]), plans[i], now, &answers);
    }
    unused = MakeRoom(&answers);
  }
  TellGaveWay(unused);
  sealed();
  Send(std::move(answers));
  return true;
}

uint64_t StepTable::Read(const StepKey& key, ReadCallback done) {
  StepResult result = nullptr;
  {
    MutexLock lock(&mutex_);
    absl::StatusOr<Entry*> entry = FindEntry(key);
    if (!entry.ok()) {
      result = entry.status();
    } else if ((*entry)->pending != nullptr) {
      const uint64_t handle = next_handle_++;
      (*entry)->waiting.emplace(handle, std::move(done));
      return handle;
    } else {
      result = *(*entry)->result;
    }
  }
  done(std::move(result));
  return 0;
}

StepResult StepTable::Peek(const StepKey& key) {
  MutexLock lock(&mutex_);
  PW_ASSIGN_OR_RETURN(Entry * entry, FindEntry(key));
  if (entry->pending != nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("step: ", DebugString(key), " is not sealed yet"));
  }
  return *entry->result;
}

void StepTable::CancelRead(const StepKey& key, uint64_t handle) {
  ReadCallback callback;
  {
    MutexLock lock(&mutex_);
    absl::StatusOr<Entry*> entry = FindEntry(key);
    if (!entry.ok()) return;
    const auto it = (*entry)->waiting.find(handle);
    if (it == (*entry)->waiting.end()) return;
    callback = std::move(it->second);
    (*entry)->waiting.erase(it);
  }
  callback(absl::CancelledError("the read was cancelled"));
}

void StepTable::NoteFetched(const StepKey& key, uint32_t rank) {
  MutexLock lock(&mutex_);
  absl::StatusOr<Entry*> found = FindEntry(key);
  if (!found.ok()) return;
  Entry& entry = **found;
  if (rank >= entry.fetched.size()) return;
  entry.fetched[rank] = true;
  entry.used = entry.used ||
               std::find(entry.fetched.begin(), entry.fetched.end(), false) ==
                   entry.fetched.end();
}

bool StepTable::NoteReported(const StepKey& key, uint32_t rank) {
  MutexLock lock(&mutex_);
  absl::StatusOr<Entry*> found = FindEntry(key);
  if (!found.ok()) return false;
  Entry& entry = **found;
  if (rank >= entry.reported.size() || entry.reported[rank]) return false;
  entry.reported[rank] = true;
  entry.used = true;
  return true;
}

std::shared_ptr<const SealedPlan> StepTable::Latest(
    const StepRequest& request) const {
  MutexLock lock(&mutex_);
  const auto job = jobs_.find(request.key.job);
  if (job == jobs_.end() || job->second.attempt != request.key.attempt) {
    return nullptr;
  }
  const auto replica = job->second.replicas.find(request.key.replica);
  if (replica == job->second.replicas.end()) return nullptr;
  auto sealed = replica->second.latest[request.batch.forward_only].lock();
  if (sealed == nullptr ||
      sealed->identity.layout_digest != request.job->layout_digest) {
    return nullptr;
  }
  return sealed;
}

std::shared_ptr<const SealedPlan> StepTable::Like(
    const StepRequest& request, absl::string_view profile_digest) const {
  MutexLock lock(&mutex_);
  const auto it =
      like_.find(LikeKey(request.job->job_digest, request.job->layout_digest,
                         request.batch_digest, profile_digest));
  return it == like_.end() ? nullptr : it->second;
}

std::vector<std::shared_ptr<const PendingStep>> StepTable::TakeDue(
    Clock::TimePoint now) {
  MutexLock lock(&mutex_);
  std::vector<std::shared_ptr<const PendingStep>> due;
  while (!due_.empty() && due_.begin()->first <= now) {
    absl::StatusOr<Entry*> entry = FindEntry(due_.begin()->second);
    PW_CHECK(entry.ok() && (*entry)->pending != nullptr);
    due.push_back((*entry)->pending);
    due_.erase(due_.begin());
  }
  return due;
}

std::vector<StepKey> StepTable::MakeRoom(Answers* answers) {
  std::vector<StepKey> unused;
  while (plan_bytes_ > options_.max_plan_bytes && sealed_.size() > 1) {
    // All but the one that was sealed last.
    const auto end = std::prev(sealed_.end());
    auto used = end;
    std::map<absl::string_view, int64_t> bytes;  // by job
    for (auto it = sealed_.begin(); it != end && used == end; ++it) {
      const Entry& entry = **FindEntry(it->second);
      bytes[it->second.job] += entry.bytes;
      if (entry.used) used = it;
    }
    if (used != end) {
      Expire(used->second, answers);
      continue;
    }
    const auto most = std::max_element(
        bytes.begin(), bytes.end(),
        [](const auto& a, const auto& b) { return a.second < b.second; });
    const auto oldest = std::find_if(
        sealed_.begin(), end,
        [&](const auto& sealed) { return sealed.second.job == most->first; });
    unused.push_back(oldest->second);
    Expire(oldest->second, answers);
  }
  return unused;
}

void StepTable::TellGaveWay(const std::vector<StepKey>& steps) const {
  if (gave_way_ == nullptr) return;
  for (const StepKey& step : steps) gave_way_(step);
}

void StepTable::Expire(const StepKey& expired, Answers* answers) {
  const StepKey key = expired;  // it may lie in what is erased
  absl::StatusOr<Replica*> replica = FindReplica(key);
  PW_CHECK(replica.ok());
  const auto it = (*replica)->steps.find(key.step);
  PW_CHECK(it != (*replica)->steps.end());
  Release(key, it->second, Expired(key), answers);
  (*replica)->steps.erase(it);
  (*replica)->floor = std::max((*replica)->floor, key.step + 1);
}

void StepTable::DropExpired(Clock::TimePoint now) {
  Answers answers;  // stays empty: nobody waits on a sealed step
  MutexLock lock(&mutex_);
  while (!expiries_.empty() && expiries_.begin()->first <= now) {
    Expire(expiries_.begin()->second, &answers);
  }
  PW_CHECK(answers.empty());
}

std::optional<Clock::TimePoint> StepTable::NextEvent() const {
  MutexLock lock(&mutex_);
  std::optional<Clock::TimePoint> next;
  if (!due_.empty()) next = due_.begin()->first;
  if (!expiries_.empty()) {
    const Clock::TimePoint expiry = expiries_.begin()->first;
    next = next.has_value() ? std::min(*next, expiry) : expiry;
  }
  return next;
}

void StepTable::AbandonPending(const absl::Status& status) {
  Answers answers;
  {
    MutexLock lock(&mutex_);
    for (auto& [job, steps] : jobs_) {
      for (auto& [index, replica] : steps.replicas) {
        for (auto it = replica.steps.begin(); it != replica.steps.end();) {
          if (it->second.pending == nullptr) {
            ++it;
            continue;
          }
          Release({job, steps.attempt, it->first, index}, it->second, status,
                  &answers);
          it = replica.steps.erase(it);
        }
      }
    }
  }
  Send(std::move(answers));
}

StepTable::Held StepTable::held() const {
  MutexLock lock(&mutex_);
  return {num_steps_, plan_bytes_};
}

int StepTable::HeldSteps(const std::string& job) const {
  MutexLock lock(&mutex_);
  const auto it = jobs_.find(job);
  if (it == jobs_.end()) return 0;
  int steps = 0;
  for (const auto& [index, replica] : it->second.replicas) {
    steps += static_cast<int>(replica.steps.size());
  }
  return steps;
}

}  // namespace pipeweaver::server
