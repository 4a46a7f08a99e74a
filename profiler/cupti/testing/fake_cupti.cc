// A stand-in for libcupti with the symbols that the agent uses: it writes real
// records into the agent's buffers, one buffer at a time for all threads.

#include "profiler/cupti/testing/fake_cupti.h"

#include <cupti.h>

#include <cstring>
#include <iterator>
#include <mutex>
#include <set>
#include <string>
#include <vector>

namespace {

std::mutex g_mutex;
int g_fail = 0;
bool g_other_subscriber = false;
bool g_subscribed = false;
CUpti_BuffersCallbackRequestFunc g_request = nullptr;
CUpti_BuffersCallbackCompleteFunc g_complete = nullptr;
std::set<int> g_enabled;
bool g_names_apis = true;
// Of the runtime's APIs: a question and a launch.
constexpr const char* kApis[] = {"cudaGetDevice_v3020",
                                 "cudaLaunchKernel_v7000"};
constexpr uint32_t kAsk = 1;
constexpr uint32_t kLaunch = 2;
uint32_t g_correlation = 0;
uint64_t g_clock_ns = 1000;
size_t g_dropped = 0;
int g_records = 0;
int g_open_buffers = 0;
uint8_t* g_buffer = nullptr;
size_t g_buffer_bytes = 0;
size_t g_used_bytes = 0;
std::vector<CUpti_ActivityKernel10> g_running;
thread_local std::vector<uint64_t> t_ids;

size_t RecordBytes(const CUpti_Activity& record) {
  switch (record.kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL:
      return sizeof(CUpti_ActivityKernel10);
    case CUPTI_ACTIVITY_KIND_MEMCPY:
      return sizeof(CUpti_ActivityMemcpy6);
    case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION:
      return sizeof(CUpti_ActivityExternalCorrelation);
    default:
      return sizeof(CUpti_ActivityAPI);
  }
}

// Hands the open buffer back. Callbacks are called without the lock, as they
// may call in again.
void CompleteBuffer(std::unique_lock<std::mutex>& lock) {
  if (g_buffer == nullptr) return;
  uint8_t* const buffer = g_buffer;
  const size_t bytes = g_buffer_bytes;
  const size_t used = g_used_bytes;
  g_buffer = nullptr;
  --g_open_buffers;
  const CUpti_BuffersCallbackCompleteFunc complete = g_complete;
  lock.unlock();
  complete(nullptr, 0, buffer, bytes, used);
  lock.lock();
}

template <typename Record>
void Write(const Record& record, std::unique_lock<std::mutex>& lock) {
  if (!g_enabled.contains(record.kind)) return;
  // Without the lock another thread may fill or complete the buffer: look
  // again.
  while (g_buffer == nullptr ||
         g_used_bytes + sizeof(record) > g_buffer_bytes) {
    CompleteBuffer(lock);
    uint8_t* buffer = nullptr;
    size_t bytes = 0;
    size_t max_records = 0;
    lock.unlock();
    g_request(&buffer, &bytes, &max_records);
    lock.lock();
    if (buffer == nullptr || bytes < sizeof(record)) return;
    if (g_buffer != nullptr) {
      lock.unlock();
      g_complete(nullptr, 0, buffer, bytes, 0);
      lock.lock();
      continue;
    }
    g_buffer = buffer;
    g_buffer_bytes = bytes;
    g_used_bytes = 0;
    ++g_open_buffers;
  }
  std::memcpy(g_buffer + g_used_bytes, &record, sizeof(record));
  g_used_bytes += sizeof(record);
  ++g_records;
}

// External id and record of an API call; returns its correlation.
uint32_t CallApi(uint32_t api_id, std::unique_lock<std::mutex>& lock) {
  const uint32_t correlation = ++g_correlation;
  if (!t_ids.empty()) {
    CUpti_ActivityExternalCorrelation id = {};
    id.kind = CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION;
    id.correlationId = correlation;
    id.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM2;
    id.externalId = t_ids.back();
    Write(id, lock);
    // kineto's ids are not ours.
    id.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
    id.externalId = 7;
    Write(id, lock);
  }
  CUpti_ActivityAPI api = {};
  api.kind = CUPTI_ACTIVITY_KIND_RUNTIME;
  api.cbid = api_id;
  api.correlationId = correlation;
  Write(api, lock);
  return correlation;
}

}  // namespace

extern "C" {

void fake_cupti_fail(int result) { g_fail = result; }

void fake_cupti_other_subscriber(int present) {
  g_other_subscriber = present != 0;
}

void fake_cupti_launch(const char* name, uint64_t duration_ns, int running) {
  // As with a driver, names outlive their records.
  static auto& names = *new std::set<std::string>();
  std::unique_lock<std::mutex> lock(g_mutex);
  CUpti_ActivityKernel10 kernel = {};
  kernel.kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
  kernel.correlationId = CallApi(kLaunch, lock);
  kernel.deviceId = 3;
  kernel.start = g_clock_ns;
  kernel.end = g_clock_ns += duration_ns;
  kernel.name = names.insert(name).first->c_str();
  if (running != 0) {
    if (g_enabled.contains(kernel.kind)) g_running.push_back(kernel);
  } else {
    Write(kernel, lock);
  }
}

void fake_cupti_finish() {
  std::unique_lock<std::mutex> lock(g_mutex);
  const std::set<int> enabled = g_enabled;
  g_enabled.insert(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  for (const CUpti_ActivityKernel10& kernel : g_running) Write(kernel, lock);
  g_running.clear();
  g_enabled = enabled;
}

void fake_cupti_copy(uint64_t duration_ns) {
  std::unique_lock<std::mutex> lock(g_mutex);
  CUpti_ActivityMemcpy6 copy = {};
  copy.kind = CUPTI_ACTIVITY_KIND_MEMCPY;
  copy.correlationId = CallApi(kLaunch, lock);
  copy.start = g_clock_ns;
  copy.end = g_clock_ns += duration_ns;
  Write(copy, lock);
}

void fake_cupti_ask() {
  std::unique_lock<std::mutex> lock(g_mutex);
  CallApi(kAsk, lock);
}

void fake_cupti_name_apis(int named) { g_names_apis = named != 0; }

void fake_cupti_drop(uint64_t records) { g_dropped = records; }

int fake_cupti_enabled_kinds() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return static_cast<int>(g_enabled.size());
}

int fake_cupti_records() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return g_records;
}

int fake_cupti_stack_depth() { return static_cast<int>(t_ids.size()); }

int fake_cupti_open_buffers() {
  const std::lock_guard<std::mutex> lock(g_mutex);
  return g_open_buffers;
}

CUptiResult CUPTIAPI cuptiSubscribe(CUpti_SubscriberHandle* subscriber,
                                    CUpti_CallbackFunc, void*) {
  if (g_fail != 0) return static_cast<CUptiResult>(g_fail);
  if (g_other_subscriber || g_subscribed)
    return CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED;
  g_subscribed = true;
  *subscriber = reinterpret_cast<CUpti_SubscriberHandle>(&g_subscribed);
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiUnsubscribe(CUpti_SubscriberHandle) {
  g_subscribed = false;
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiGetResultString(CUptiResult result,
                                          const char** text) {
  *text = result == CUPTI_ERROR_INSUFFICIENT_PRIVILEGES
              ? "CUPTI_ERROR_INSUFFICIENT_PRIVILEGES"
              : "CUPTI_ERROR_UNKNOWN";
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI
cuptiActivityRegisterCallbacks(CUpti_BuffersCallbackRequestFunc request,
                               CUpti_BuffersCallbackCompleteFunc complete) {
  g_request = request;
  g_complete = complete;
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityEnable(CUpti_ActivityKind kind) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  if (g_fail != 0) return static_cast<CUptiResult>(g_fail);
  g_enabled.insert(kind);
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityDisable(CUpti_ActivityKind kind) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_enabled.erase(kind);
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiGetCallbackName(CUpti_CallbackDomain, uint32_t id,
                                          const char** name) {
  if (!g_names_apis || id < 1 || id > std::size(kApis))
    return CUPTI_ERROR_INVALID_PARAMETER;
  *name = kApis[id - 1];
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityFlushAll(uint32_t flag) {
  if ((flag & CUPTI_ACTIVITY_FLAG_FLUSH_FORCED) != 0) fake_cupti_finish();
  std::unique_lock<std::mutex> lock(g_mutex);
  CompleteBuffer(lock);
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityGetNextRecord(uint8_t* buffer,
                                                size_t valid_bytes,
                                                CUpti_Activity** record) {
  uint8_t* next = buffer;
  if (*record != nullptr)
    next = reinterpret_cast<uint8_t*>(*record) + RecordBytes(**record);
  if (next >= buffer + valid_bytes) return CUPTI_ERROR_MAX_LIMIT_REACHED;
  *record = reinterpret_cast<CUpti_Activity*>(next);
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityGetNumDroppedRecords(CUcontext, uint32_t,
                                                       size_t* dropped) {
  *dropped = g_dropped;
  g_dropped = 0;
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityPushExternalCorrelationId(
    CUpti_ExternalCorrelationKind, uint64_t id) {
  t_ids.push_back(id);
  return CUPTI_SUCCESS;
}

CUptiResult CUPTIAPI cuptiActivityPopExternalCorrelationId(
    CUpti_ExternalCorrelationKind, uint64_t* last) {
  if (t_ids.empty()) return CUPTI_ERROR_QUEUE_EMPTY;
  *last = t_ids.back();
  t_ids.pop_back();
  return CUPTI_SUCCESS;
}

}  // extern "C"
