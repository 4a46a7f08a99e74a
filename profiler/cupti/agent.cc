// The agent: duty cycle, buffers, sums, and giving way.

#include "profiler/cupti/agent.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace pipeweaver::cupti {
namespace {

constexpr std::size_t kSmallBufferBytes = 64 << 10;
constexpr int kWorkerWaitMs = 100;

// An external id is the step, its low 31 bits plus one, above the annotation's
// number: a kernel's step is that of its launch, whenever it runs.
constexpr int kAnnotationBits = 32;
constexpr uint64_t kStepMask = 0x7fffffff;

uint64_t MakeId(int64_t step, uint32_t annotation) {
  return ((static_cast<uint64_t>(step) & kStepMask) + 1) << kAnnotationBits |
         annotation;
}

int64_t StepOf(uint64_t id) {
  return static_cast<int64_t>(id >> kAnnotationBits) - 1;
}

uint32_t AnnotationOf(uint64_t id) { return static_cast<uint32_t>(id); }

// Which of this thread's pushes reached the source: tracing may begin or end in
// between. Annotations nest a few deep; those past 64 are not pushed.
struct PushStack {
  uint64_t pushed = 0;
  int depth = 0;
};
thread_local PushStack t_stack;

}  // namespace

void Say(const std::string& text) {
  const std::string line = "pipeweaver-cupti: " + text + "\n";
  // A guest has nobody to tell that stderr is closed.
  [[maybe_unused]] const ssize_t written =
      write(STDERR_FILENO, line.data(), line.size());
}

void BufferPool::Free::operator()(uint8_t* data) const { std::free(data); }

BufferPool::BufferPool(std::size_t buffers, std::size_t buffer_bytes)
    : buffer_bytes_(buffer_bytes) {
  free_.reserve(buffers);
  filled_.reserve(buffers);
  for (std::size_t i = 0; i < buffers; ++i) {
    auto* data = static_cast<uint8_t*>(std::aligned_alloc(64, buffer_bytes));
    if (data == nullptr) break;
    prepared_.emplace_back(data);
    free_.push_back(data);
  }
  std::sort(prepared_.begin(), prepared_.end());
}

uint8_t* BufferPool::Request(std::size_t* bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_.empty()) {
      uint8_t* data = free_.back();
      free_.pop_back();
      *bytes = buffer_bytes_;
      return data;
    }
  }
  auto* data = static_cast<uint8_t*>(std::aligned_alloc(64, kSmallBufferBytes));
  *bytes = data != nullptr ? kSmallBufferBytes : 0;
  return data;
}

void BufferPool::Complete(const FilledBuffer& buffer) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    filled_.push_back(buffer);
  }
  changed_.notify_one();
}

std::vector<FilledBuffer> BufferPool::TakeFilled(int wait_ms) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, std::chrono::milliseconds(wait_ms),
                    [this] { return !filled_.empty() || woken_; });
  woken_ = false;
  return std::exchange(filled_, {});
}

void BufferPool::Return(uint8_t* data) {
  const bool is_prepared = std::binary_search(
      prepared_.begin(), prepared_.end(), data,
      [](const auto& a, const auto& b) { return &*a < &*b; });
  if (!is_prepared) {
    std::free(data);
    return;
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  free_.push_back(data);
}

void BufferPool::Wake() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    woken_ = true;
  }
  changed_.notify_one();
}

uint32_t AnnotationNumbers::NumberOf(const std::string& text) {
  if (const auto found = young_.numbers.find(text);
      found != young_.numbers.end()) {
    return found->second;
  }
  if (young_.numbers.size() >= max_young_) old_ = std::exchange(young_, {});
  uint32_t number = 0;
  if (const auto found = old_.numbers.find(text); found != old_.numbers.end()) {
    number = found->second;
  } else {
    // 0 is no text's number, even after 2^32 texts.
    number = last_ = std::max<uint32_t>(1, last_ + 1);
  }
  young_.numbers.emplace(text, number);
  young_.texts.emplace(number, text);
  return number;
}

std::string AnnotationNumbers::TextOf(uint32_t number) const {
  for (const Generation* generation : {&young_, &old_}) {
    if (const auto found = generation->texts.find(number);
        found != generation->texts.end()) {
      return found->second;
    }
  }
  return "";
}

uint32_t Agent::Sums::NameNumber(const char* name) {
  const auto found = name_numbers_.find(name);
  if (found != name_numbers_.end()) return found->second;
  if (names_.size() >= agent_->options_.max_texts) name = "<other>";
  const auto [entry, is_new] =
      name_numbers_.try_emplace(name, static_cast<uint32_t>(names_.size()));
  if (is_new) names_.push_back(entry->first);
  return entry->second;
}

void Agent::Sums::OnDeviceActivity(const DeviceActivity& activity) {
  if (activity.end_ns < activity.start_ns || activity.end_ns == 0 ||
      pending_.size() >= agent_->options_.max_pending) {
    agent_->CountLost(1);
    return;
  }
  pending_.push_back(
      {NameNumber(activity.name), activity.correlation, activity.device,
       activity.is_copy ? RecordKind::kCopy : RecordKind::kKernel, 0,
       activity.end_ns - activity.start_ns});
}

void Agent::Sums::OnExternalId(uint32_t correlation, uint64_t id) {
  if (ids_.size() < agent_->options_.max_pending) {
    ids_[correlation] = id;
  } else {
    // Its kernel will be nobody's.
    agent_->CountLost(1);
  }
}

std::optional<uint64_t> Agent::Sums::IdOf(uint32_t correlation) const {
  if (const auto found = ids_.find(correlation); found != ids_.end()) {
    return found->second;
  }
  for (const auto& ids : old_ids_) {
    if (const auto found = ids.find(correlation); found != ids.end()) {
      return found->second;
    }
  }
  return std::nullopt;
}

void Agent::Sums::WriteOut(RingWriter* ring, bool last) {
  // Ids and kernels come in different buffers, in any order.
  std::vector<Pending> waiting;
  for (Pending& one : pending_) {
    std::optional<uint64_t> id = IdOf(one.correlation);
    if (!id.has_value() && one.waited < kStragglers && !last) {
      ++one.waited;
      waiting.push_back(one);
      continue;
    }
    Sum& sum = sums_[{id.value_or(0), one.name, one.device, one.kind}];
    ++sum.count;
    sum.total_ns += one.duration_ns;
    sum.min_ns = std::min(sum.min_ns, one.duration_ns);
    sum.max_ns = std::max(sum.max_ns, one.duration_ns);
  }
  for (const auto& [key, sum] : sums_) {
    const auto& [id, name, device, kind] = key;
    AgentRecord record;
    record.step = StepOf(id);
    record.kind = kind;
    record.device = device;
    record.count = sum.count;
    record.total_ns = sum.total_ns;
    record.min_ns = sum.min_ns;
    record.max_ns = sum.max_ns;
    {
      const std::lock_guard<std::mutex> lock(agent_->annotations_mutex_);
      CopyText(agent_->annotations_.TextOf(AnnotationOf(id)), record.annotation,
               sizeof(record.annotation));
    }
    CopyText(names_[name], record.name, sizeof(record.name));
    ring->Write(record);
  }
  pending_ = std::move(waiting);
  std::rotate(old_ids_.begin(), old_ids_.end() - 1, old_ids_.end());
  old_ids_.front() = std::exchange(ids_, {});
  sums_.clear();
}

Agent::Agent(const AgentOptions& options,
             std::unique_ptr<ActivitySource> source,
             const std::string& off_reason)
    : options_(options),
      source_(std::move(source)),
      pool_(source_ != nullptr ? options.buffers : 0, options.buffer_bytes),
      annotations_(options.max_texts) {
  if (source_ == nullptr) {
    TurnOff(off_reason);
    return;
  }
  if (!ring_.Open(options_.ring_path, options_.ring_slots)) {
    TurnOff(options_.ring_path + ": " + std::strerror(errno));
    return;
  }
  SetState(PW_CUPTI_IDLE, "");
  worker_ = std::thread([this] { Work(); });
}

Agent::~Agent() {
  if (!forked_.load(std::memory_order_relaxed)) Stop();
}

void Agent::SetState(pw_cupti_state state, const std::string& reason) {
  state_ = state;
  reason_ = reason;
  tracing_.store(state == PW_CUPTI_ACTIVE, std::memory_order_release);
  if (RingHeader* header = ring_.header()) header->state = state;
}

void Agent::TurnOff(const std::string& reason) {
  SetState(PW_CUPTI_OFF, reason);
  Say("off: " + reason);
}

void Agent::CountLost(uint64_t records) {
  if (RingHeader* header = ring_.header()) {
    header->lost_activities.fetch_add(records, std::memory_order_relaxed);
  }
}

void Agent::BeginWindow() {
  std::string reason;
  switch (source_->Start(&pool_, &reason)) {
    case SourceStatus::kOk:
      said_busy_ = false;
      hands_off_.store(false, std::memory_order_release);
      SetState(PW_CUPTI_ACTIVE, "");
      return;
    case SourceStatus::kBusy:
      GiveWay(reason);
      return;
    case SourceStatus::kImpossible:
      TurnOff(reason);
      return;
  }
}

void Agent::EndWindow() {
  source_->Stop();
  window_closed_.store(true, std::memory_order_release);
  SetState(PW_CUPTI_IDLE, "");
  pool_.Wake();
}

// What is enabled stays so: the other client's switches are the same ones.
void Agent::GiveWay(const std::string& reason) {
  hands_off_.store(true, std::memory_order_release);
  ring_.header()->yields.fetch_add(1, std::memory_order_relaxed);
  SetState(PW_CUPTI_YIELDED, reason);
  if (!std::exchange(said_busy_, true)) Say("gives way: " + reason);
}

void Agent::Step(int64_t step) {
  if (forked_.load(std::memory_order_relaxed)) return;
  const std::lock_guard<std::mutex> lock(state_mutex_);
  if (state_ == PW_CUPTI_OFF || stopped_ || detached_) return;
  step_.store(step, std::memory_order_relaxed);
  // A step before the first: the trainer went back to a checkpoint.
  if (first_step_ < 0 || step < first_step_) first_step_ = step;
  const bool active =
      (step - first_step_) % options_.period_steps < options_.active_steps;
  if (state_ == PW_CUPTI_ACTIVE) {
    std::string reason;
    if (source_->Probe(&reason) != SourceStatus::kOk) {
      GiveWay(reason);
    } else if (!active) {
      EndWindow();
    }
  } else if (active) {
    BeginWindow();
  } else if (state_ == PW_CUPTI_YIELDED) {
    SetState(PW_CUPTI_IDLE, "");
  }
  if (state_ == PW_CUPTI_ACTIVE) {
    ring_.header()->traced_steps.fetch_add(1, std::memory_order_relaxed);
  }
}

uint64_t Agent::AnnotationId(const char* annotation) {
  const std::lock_guard<std::mutex> lock(annotations_mutex_);
  return MakeId(step_.load(std::memory_order_relaxed),
                annotations_.NumberOf(annotation));
}

void Agent::Push(const char* annotation) {
  if (forked_.load(std::memory_order_relaxed)) return;
  PushStack& stack = t_stack;
  const int level = stack.depth++;
  if (level >= 64) return;
  stack.pushed &= ~(uint64_t{1} << level);
  if (!tracing_.load(std::memory_order_acquire)) return;
  source_->PushId(AnnotationId(annotation != nullptr ? annotation : ""));
  stack.pushed |= uint64_t{1} << level;
}

void Agent::Pop() {
  if (forked_.load(std::memory_order_relaxed)) return;
  PushStack& stack = t_stack;
  if (stack.depth == 0) return;
  const int level = --stack.depth;
  // Also after tracing ended: the id lies on CUPTI's stack of this thread.
  if (level < 64 && (stack.pushed >> level & 1) != 0) source_->PopId();
}

void Agent::Detach() {
  if (forked_.load(std::memory_order_relaxed)) return;
  const std::lock_guard<std::mutex> lock(state_mutex_);
  if (state_ == PW_CUPTI_OFF || stopped_ || detached_) return;
  detached_ = true;
  ring_.header()->yields.fetch_add(1, std::memory_order_relaxed);
  if (state_ == PW_CUPTI_ACTIVE) EndWindow();
  // What is complete comes in now; later the other profiler's callbacks are in
  // place.
  if (!hands_off_.exchange(true, std::memory_order_acq_rel))
    source_->Flush(/*all=*/false);
  SetState(PW_CUPTI_YIELDED, "detached by the trainer");
}

void Agent::Attach() {
  if (forked_.load(std::memory_order_relaxed)) return;
  const std::lock_guard<std::mutex> lock(state_mutex_);
  if (!detached_) return;
  detached_ = false;
  if (state_ == PW_CUPTI_YIELDED) SetState(PW_CUPTI_IDLE, "");
}

pw_cupti_state Agent::Status(std::string* reason) {
  const std::lock_guard<std::mutex> lock(state_mutex_);
  *reason = reason_;
  return state_;
}

void Agent::Stop() {
  {
    const std::lock_guard<std::mutex> lock(state_mutex_);
    if (std::exchange(stopped_, true)) return;
    if (state_ == PW_CUPTI_ACTIVE) EndWindow();
    if (state_ != PW_CUPTI_OFF) SetState(PW_CUPTI_OFF, "stopped");
  }
  stopping_.store(true, std::memory_order_release);
  pool_.Wake();
  if (worker_.joinable()) worker_.join();
  const std::lock_guard<std::mutex> lock(state_mutex_);
  ring_.Close();
}

void Agent::Work() {
  using Clock = std::chrono::steady_clock;
  const auto grace = std::chrono::milliseconds(options_.grace_ms);
  Clock::time_point flush_until = Clock::now();
  Clock::time_point next_write = Clock::now() + grace;
  while (true) {
    const bool stopping = stopping_.load(std::memory_order_acquire);
    const Clock::time_point now = Clock::now();
    const bool write = stopping || now >= next_write;
    if (window_closed_.exchange(false, std::memory_order_acq_rel))
      flush_until = now + grace;
    // Unforced, a flush returns no buffer with a kernel still running: asked
    // again until the grace is over. Never under a lock that the callbacks
    // take.
    const bool flush = now < flush_until ||
                       (write && tracing_.load(std::memory_order_acquire));
    if (flush && !hands_off_.load(std::memory_order_acquire))
      source_->Flush(/*all=*/stopping);
    const std::vector<FilledBuffer> filled =
        pool_.TakeFilled(stopping ? 0 : kWorkerWaitMs);
    for (const FilledBuffer& buffer : filled) {
      if (buffer.data == nullptr) continue;
      CountLost(source_->Parse(buffer, &sums_));
      pool_.Return(buffer.data);
    }
    if (write) {
      sums_.WriteOut(&ring_, /*last=*/stopping && filled.empty());
      next_write = now + grace;
    }
    if (stopping && filled.empty()) return;
  }
}

}  // namespace pipeweaver::cupti
