// Activities from NVIDIA's CUPTI.

#include "profiler/cupti/cupti_source.h"

#include <cupti.h>
#include <dlfcn.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <vector>

namespace pipeweaver::cupti {
namespace {

// kineto takes CUSTOM0 and CUSTOM1.
constexpr CUpti_ExternalCorrelationKind kOurIds =
    CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM2;

// The newest record that the headers know; older libraries write a prefix of
// it, and every field read here stands in all of them since CUDA 11.
using KernelRecord = CUpti_ActivityKernel9;
using MemcpyRecord = CUpti_ActivityMemcpy5;

struct Functions {
  decltype(&::cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
  decltype(&::cuptiActivityEnable) enable = nullptr;
  decltype(&::cuptiActivityDisable) disable = nullptr;
  decltype(&::cuptiActivityFlushAll) flush_all = nullptr;
  decltype(&::cuptiActivityGetNextRecord) get_next_record = nullptr;
  decltype(&::cuptiActivityGetNumDroppedRecords) get_num_dropped_records =
      nullptr;
  decltype(&::cuptiActivityPushExternalCorrelationId) push_external_id =
      nullptr;
  decltype(&::cuptiActivityPopExternalCorrelationId) pop_external_id = nullptr;
  decltype(&::cuptiSubscribe) subscribe = nullptr;
  decltype(&::cuptiUnsubscribe) unsubscribe = nullptr;
  decltype(&::cuptiGetResultString) get_result_string = nullptr;
  decltype(&::cuptiGetCallbackName) get_callback_name = nullptr;
};

template <typename Function>
bool Load(void* library, const char* name, Function* function,
          std::string* reason) {
  *function = reinterpret_cast<Function>(dlsym(library, name));
  if (*function == nullptr) *reason = std::string("libcupti has no ") + name;
  return *function != nullptr;
}

bool LoadAll(void* library, Functions* f, std::string* reason) {
  return Load(library, "cuptiActivityRegisterCallbacks", &f->register_callbacks,
              reason) &&
         Load(library, "cuptiActivityEnable", &f->enable, reason) &&
         Load(library, "cuptiActivityDisable", &f->disable, reason) &&
         Load(library, "cuptiActivityFlushAll", &f->flush_all, reason) &&
         Load(library, "cuptiActivityGetNextRecord", &f->get_next_record,
              reason) &&
         Load(library, "cuptiActivityGetNumDroppedRecords",
              &f->get_num_dropped_records, reason) &&
         Load(library, "cuptiActivityPushExternalCorrelationId",
              &f->push_external_id, reason) &&
         Load(library, "cuptiActivityPopExternalCorrelationId",
              &f->pop_external_id, reason) &&
         Load(library, "cuptiSubscribe", &f->subscribe, reason) &&
         Load(library, "cuptiUnsubscribe", &f->unsubscribe, reason) &&
         Load(library, "cuptiGetResultString", &f->get_result_string, reason) &&
         Load(library, "cuptiGetCallbackName", &f->get_callback_name, reason);
}

// CUPTI's callbacks carry no user data.
std::atomic<BufferOwner*> g_owner{nullptr};

void CUPTIAPI OnRequest(uint8_t** buffer, size_t* size, size_t* max_records) {
  *max_records = 0;
  *size = 0;
  *buffer = nullptr;
  if (BufferOwner* owner = g_owner.load(std::memory_order_acquire)) {
    *buffer = owner->Request(size);
  }
}

void CUPTIAPI OnComplete(CUcontext context, uint32_t stream, uint8_t* buffer,
                         size_t, size_t valid_bytes) {
  if (BufferOwner* owner = g_owner.load(std::memory_order_acquire)) {
    owner->Complete({buffer, valid_bytes, context, stream});
  }
}

void CUPTIAPI IgnoreCallback(void*, CUpti_CallbackDomain, CUpti_CallbackId,
                             const void*) {}

// External ids come with the records of API calls.
constexpr CUpti_ActivityKind kKinds[] = {
    CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION, CUPTI_ACTIVITY_KIND_RUNTIME,
    CUPTI_ACTIVITY_KIND_DRIVER, CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
    CUPTI_ACTIVITY_KIND_MEMCPY};

// Of API calls only those that launch kernels or copies are wanted; a trainer
// makes several times as many others. They are known by their names, which the
// library has of those, too, that the headers do not know. (CUPTI can be told
// to record single APIs only; then no external ids come at all, seen on
// CUDA 13.0, or it costs the trainer as much.)
class LaunchApis {
 public:
  explicit LaunchApis(const Functions& f)
      : runtime_(OfDomain(f, CUPTI_CB_DOMAIN_RUNTIME_API)),
        driver_(OfDomain(f, CUPTI_CB_DOMAIN_DRIVER_API)) {}

  // `kind`: of the call's record. True for a call without a name.
  bool Contains(CUpti_ActivityKind kind, CUpti_CallbackId id) const {
    const std::vector<bool>& launches =
        kind == CUPTI_ACTIVITY_KIND_RUNTIME ? runtime_ : driver_;
    return id >= launches.size() || launches[id];
  }

 private:
  static std::vector<bool> OfDomain(const Functions& f,
                                    CUpti_CallbackDomain domain) {
    std::vector<bool> launches = {true};  // ids begin with 1
    const char* name = nullptr;
    while (f.get_callback_name(domain,
                               static_cast<CUpti_CallbackId>(launches.size()),
                               &name) == CUPTI_SUCCESS) {
      launches.push_back(std::strstr(name, "Launch") != nullptr ||
                         std::strstr(name, "Memcpy") != nullptr);
    }
    return launches;
  }

  const std::vector<bool> runtime_;
  const std::vector<bool> driver_;
};

class CuptiSource : public ActivitySource {
 public:
  explicit CuptiSource(const Functions& functions)
      : f_(functions), launch_apis_(functions) {}
  ~CuptiSource() override { g_owner.store(nullptr, std::memory_order_release); }

  // The activity interface needs no subscriber, but whoever else traces has
  // one: where we can become the subscriber for a moment, nobody is there.
  SourceStatus Probe(std::string* reason) override {
    CUpti_SubscriberHandle handle = nullptr;
    const CUptiResult result = f_.subscribe(&handle, &IgnoreCallback, nullptr);
    if (result == CUPTI_SUCCESS) {
      f_.unsubscribe(handle);
      return SourceStatus::kOk;
    }
    if (result == CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED) {
      *reason = "another CUPTI client is at work";
      return SourceStatus::kBusy;
    }
    *reason = Describe("cuptiSubscribe", result);
    return SourceStatus::kImpossible;
  }

  SourceStatus Start(BufferOwner* owner, std::string* reason) override {
    if (const SourceStatus status = Probe(reason); status != SourceStatus::kOk)
      return status;
    g_owner.store(owner, std::memory_order_release);
    // Again at every start: whoever traced in between put in callbacks of its
    // own.
    CUptiResult result = f_.register_callbacks(&OnRequest, &OnComplete);
    if (result != CUPTI_SUCCESS) {
      *reason = Describe("cuptiActivityRegisterCallbacks", result);
      return SourceStatus::kImpossible;
    }
    for (const CUpti_ActivityKind kind : kKinds) {
      result = f_.enable(kind);
      if (result != CUPTI_SUCCESS) {
        *reason = Describe("cuptiActivityEnable", result);
        Stop();
        return SourceStatus::kImpossible;
      }
    }
    return SourceStatus::kOk;
  }

  void Stop() override {
    for (const CUpti_ActivityKind kind : kKinds) f_.disable(kind);
  }

  void Flush(bool all) override {
    f_.flush_all(all ? CUPTI_ACTIVITY_FLAG_FLUSH_FORCED : 0);
  }

  uint64_t Parse(const FilledBuffer& buffer, ActivitySink* sink) override {
    // The last id whose call has not come: the call's record stands behind it.
    const CUpti_ActivityExternalCorrelation* open = nullptr;
    const auto take_open = [&] {
      if (open != nullptr)
        sink->OnExternalId(open->correlationId, open->externalId);
      open = nullptr;
    };
    CUpti_Activity* record = nullptr;
    while (buffer.valid_bytes > 0 &&
           f_.get_next_record(buffer.data, buffer.valid_bytes, &record) ==
               CUPTI_SUCCESS) {
      switch (record->kind) {
        case CUPTI_ACTIVITY_KIND_KERNEL:
        case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: {
          const auto* kernel = reinterpret_cast<const KernelRecord*>(record);
          sink->OnDeviceActivity(
              {false, kernel->deviceId, kernel->correlationId, kernel->start,
               kernel->end, kernel->name != nullptr ? kernel->name : ""});
          break;
        }
        case CUPTI_ACTIVITY_KIND_MEMCPY: {
          const auto* copy = reinterpret_cast<const MemcpyRecord*>(record);
          sink->OnDeviceActivity({true, copy->deviceId, copy->correlationId,
                                  copy->start, copy->end, "memcpy"});
          break;
        }
        case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION: {
          const auto* id =
              reinterpret_cast<const CUpti_ActivityExternalCorrelation*>(
                  record);
          if (id->externalKind == kOurIds) {
            take_open();
            open = id;
          }
          break;
        }
        case CUPTI_ACTIVITY_KIND_RUNTIME:
        case CUPTI_ACTIVITY_KIND_DRIVER: {
          const auto* call = reinterpret_cast<const CUpti_ActivityAPI*>(record);
          if (open != nullptr && open->correlationId == call->correlationId) {
            if (launch_apis_.Contains(call->kind, call->cbid)) take_open();
            open = nullptr;
          }
          break;
        }
        default:
          break;
      }
    }
    take_open();
    size_t dropped = 0;
    if (f_.get_num_dropped_records(static_cast<CUcontext>(buffer.context),
                                   buffer.stream, &dropped) != CUPTI_SUCCESS) {
      return 0;
    }
    return dropped;
  }

  void PushId(uint64_t id) override { f_.push_external_id(kOurIds, id); }

  void PopId() override {
    uint64_t last = 0;
    f_.pop_external_id(kOurIds, &last);
  }

 private:
  std::string Describe(const char* function, CUptiResult result) const {
    const char* name = nullptr;
    f_.get_result_string(result, &name);
    std::string text = std::string(function) + ": " +
                       (name != nullptr ? name : "error") + " (" +
                       std::to_string(static_cast<int>(result)) + ")";
    if (result == CUPTI_ERROR_INSUFFICIENT_PRIVILEGES) {
      text += ", no right to trace: see NVreg_RestrictProfilingToAdminUsers";
    } else if (result == CUPTI_ERROR_UNKNOWN ||
               result == CUPTI_ERROR_NOT_INITIALIZED) {
      text += ", no usable GPU";
    }
    return text;
  }

  const Functions f_;
  const LaunchApis launch_apis_;
};

}  // namespace

std::unique_ptr<ActivitySource> OpenCupti(const std::string& library,
                                          std::string* reason) {
  void* handle = nullptr;
  if (!library.empty()) {
    handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  } else {
    // Two copies of libcupti in a process do not work: first the one that is
    // there.
    constexpr const char* kNames[] = {"libcupti.so.13", "libcupti.so.12",
                                      "libcupti.so.11.8", "libcupti.so",
                                      "/usr/local/cuda/lib64/libcupti.so"};
    for (const int mode : {RTLD_NOLOAD, 0}) {
      for (const char* name : kNames) {
        if (handle == nullptr)
          handle = dlopen(name, RTLD_NOW | RTLD_LOCAL | mode);
      }
    }
  }
  if (handle == nullptr) {
    const char* error = dlerror();
    *reason =
        std::string("no libcupti: ") + (error != nullptr ? error : "not found");
    return nullptr;
  }
  Functions functions;
  if (!LoadAll(handle, &functions, reason)) return nullptr;
  return std::make_unique<CuptiSource>(functions);
}

bool HasGpu(std::string* reason) {
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL) == nullptr) {
    const char* error = dlerror();
    *reason = std::string("no CUDA driver: ") +
              (error != nullptr ? error : "not found");
    return false;
  }
  // The driver's library may be there alone, in a container's image. The second
  // is that of Windows' subsystem for Linux.
  if (access("/dev/nvidiactl", F_OK) != 0 && access("/dev/dxg", F_OK) != 0) {
    *reason = "no GPU: there is no /dev/nvidiactl";
    return false;
  }
  return true;
}

}  // namespace pipeweaver::cupti
