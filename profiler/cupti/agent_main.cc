// The C interface over the one agent of the process.

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "profiler/cupti/agent.h"
#include "profiler/cupti/cupti_source.h"
#include "profiler/cupti/pipeweaver_cupti.h"

#define PW_EXPORT extern "C" __attribute__((visibility("default")))

namespace pipeweaver::cupti {
namespace {

// Never deleted: threads of the trainer may call in until the process ends.
std::atomic<Agent*> g_agent{nullptr};
// A trainer's thread and the driver may both start the agent.
std::mutex g_start_mutex;
bool g_started = false;  // guarded by g_start_mutex

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

// Two numbers within limits, else false: a wrong setting turns the agent off.
bool ReadPair(const std::string& text, char separator, long limit, long* first,
              long* second) {
  char found = '\0';
  char rest = '\0';
  return std::sscanf(text.c_str(), "%9ld%c%9ld%c", first, &found, second,
                     &rest) == 3 &&
         found == separator && *first >= 1 && *second >= 1 && *first <= limit &&
         *second <= limit;
}

bool ReadOptions(AgentOptions* options, std::string* reason) {
  options->ring_path = Environment("PIPEWEAVER_CUPTI_RING");
  if (options->ring_path.empty()) {
    // Containers may share /dev/shm and count their processes alike.
    const auto now =
        std::chrono::system_clock::now().time_since_epoch().count();
    const std::string prefix =
        "/dev/shm/pipeweaver-cupti-" + std::to_string(getuid()) + "-";
    RemoveLeftRings(prefix);
    options->ring_path =
        prefix + std::to_string(getpid()) + "-" + std::to_string(now);
  }
  long first = 0;
  long second = 0;
  if (const std::string duty = Environment("PIPEWEAVER_CUPTI_DUTY");
      !duty.empty()) {
    if (!ReadPair(duty, '/', 1'000'000, &first, &second) || first > second) {
      *reason = "PIPEWEAVER_CUPTI_DUTY '" + duty +
                "' must be ACTIVE/PERIOD, 1 <= ACTIVE <= PERIOD";
      return false;
    }
    options->active_steps = first;
    options->period_steps = second;
  }
  if (const std::string buffers = Environment("PIPEWEAVER_CUPTI_BUFFERS");
      !buffers.empty()) {
    if (!ReadPair(buffers, 'x', 65536, &first, &second) ||
        first * second > (1 << 20)) {
      *reason = "PIPEWEAVER_CUPTI_BUFFERS '" + buffers +
                "' must be COUNTxKIB, at most 1 GiB in all";
      return false;
    }
    options->buffers = static_cast<std::size_t>(first);
    options->buffer_bytes = static_cast<std::size_t>(second) << 10;
  }
  return true;
}

// `by_driver`: it calls, so there is a GPU.
void Start(bool by_driver) {
  const std::lock_guard<std::mutex> lock(g_start_mutex);
  if (std::exchange(g_started, true)) return;
  if (Environment("PIPEWEAVER_CUPTI") == "0") return;
  AgentOptions options;
  std::string reason;
  std::unique_ptr<ActivitySource> source;
  const std::string library = Environment("PIPEWEAVER_CUPTI_LIBRARY");
  if (ReadOptions(&options, &reason) &&
      (by_driver || !library.empty() || HasGpu(&reason))) {
    source = OpenCupti(library, &reason);
  }
  g_agent.store(new Agent(options, std::move(source), reason),
                std::memory_order_release);
  // Handlers run last first: this before libcupti's own, which was opened
  // above. (A destructor of this library might run after libcupti's.)
  std::atexit([] {
    if (Agent* agent = g_agent.load(std::memory_order_acquire)) agent->Stop();
  });
  // A child has no worker and must not touch the parent's ring or CUPTI.
  pthread_atfork(nullptr, nullptr, [] {
    if (Agent* agent = g_agent.load(std::memory_order_acquire))
      agent->ForgetInChild();
    g_agent.store(nullptr, std::memory_order_release);
  });
}

Agent* Get() { return g_agent.load(std::memory_order_acquire); }

// What fails in here (no memory, no thread) must not reach the trainer.
template <typename Function>
void Guarded(const Function& function) {
  try {
    function();
  } catch (...) {
    Say("an internal error; the call was ignored");
  }
}

}  // namespace
}  // namespace pipeweaver::cupti

using pipeweaver::cupti::Agent;
using pipeweaver::cupti::Get;
using pipeweaver::cupti::Guarded;

PW_EXPORT void pw_cupti_start(void) {
  Guarded([] { pipeweaver::cupti::Start(/*by_driver=*/false); });
}

PW_EXPORT int InitializeInjection(void) {
  Guarded([] { pipeweaver::cupti::Start(/*by_driver=*/true); });
  return 1;
}

PW_EXPORT void pw_cupti_step(int64_t step) {
  Guarded([step] {
    if (Agent* agent = Get()) agent->Step(step);
  });
}

PW_EXPORT void pw_cupti_push(const char* annotation) {
  Guarded([annotation] {
    if (Agent* agent = Get()) agent->Push(annotation);
  });
}

PW_EXPORT void pw_cupti_pop(void) {
  Guarded([] {
    if (Agent* agent = Get()) agent->Pop();
  });
}

PW_EXPORT void pw_cupti_detach(void) {
  Guarded([] {
    if (Agent* agent = Get()) agent->Detach();
  });
}

PW_EXPORT void pw_cupti_attach(void) {
  Guarded([] {
    if (Agent* agent = Get()) agent->Attach();
  });
}

PW_EXPORT pw_cupti_state pw_cupti_status(char* reason, size_t reason_bytes) {
  pw_cupti_state state = PW_CUPTI_OFF;
  Guarded([&] {
    std::string text = "not started";
    if (Agent* agent = Get()) state = agent->Status(&text);
    if (reason != nullptr && reason_bytes > 0) {
      std::snprintf(reason, reason_bytes, "%s", text.c_str());
    }
  });
  return state;
}

PW_EXPORT void pw_cupti_stop(void) {
  Guarded([] {
    if (Agent* agent = Get()) agent->Stop();
  });
}
