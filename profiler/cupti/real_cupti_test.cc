// The real libcupti, where it is installed: it walks hand-made buffers, and
// without a GPU the agent turns itself off.

#include <cupti.h>

#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "profiler/cupti/agent.h"
#include "profiler/cupti/cupti_source.h"

namespace pipeweaver::cupti {
namespace {

class Recorder : public ActivitySink {
 public:
  void OnDeviceActivity(const DeviceActivity& activity) override {
    activities.emplace_back(activity.name, activity.is_copy, activity.device,
                            activity.correlation,
                            activity.end_ns - activity.start_ns);
  }
  void OnExternalId(uint32_t correlation, uint64_t id) override {
    ids.emplace_back(correlation, id);
  }

  std::vector<std::tuple<std::string, bool, uint32_t, uint32_t, uint64_t>>
      activities;
  std::vector<std::pair<uint32_t, uint64_t>> ids;
};

class RealCuptiTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string reason;
    // Later ones overflow the stack.
    if (CUPTI_API_VERSION >= 130100 && !HasGpu(&reason)) {
      GTEST_SKIP() << "skipped: " << reason;
    }
    source_ = OpenCupti("", &reason);
    if (source_ == nullptr) GTEST_SKIP() << "skipped: " << reason;
  }

  template <typename Record>
  void Append(const Record& record) {
    std::memcpy(buffer_ + used_, &record, sizeof(record));
    used_ += sizeof(record);
  }

  Recorder Parse() {
    Recorder recorder;
    source_->Parse({buffer_, used_, nullptr, 0}, &recorder);
    return recorder;
  }

  std::unique_ptr<ActivitySource> source_;
  alignas(8) uint8_t buffer_[4096] = {};
  std::size_t used_ = 0;
};

TEST_F(RealCuptiTest, WalksHandMadeRecords) {
  CUpti_ActivityExternalCorrelation id = {};
  id.kind = CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION;
  id.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM2;
  id.externalId = 0x500000001;
  id.correlationId = 42;
  Append(id);
  // Another tool's.
  id.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
  Append(id);
  CUpti_ActivityAPI api = {};
  api.kind = CUPTI_ACTIVITY_KIND_RUNTIME;
  api.cbid = CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_v7000;
  api.correlationId = 42;
  Append(api);
  CUpti_ActivityKernel10 kernel = {};
  kernel.kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
  kernel.deviceId = 1;
  kernel.correlationId = 42;
  kernel.start = 1'700'000'000'000'000'000;
  kernel.end = kernel.start + 1234;
  kernel.name = "gemm";
  Append(kernel);
  CUpti_ActivityMemcpy6 copy = {};
  copy.kind = CUPTI_ACTIVITY_KIND_MEMCPY;
  copy.correlationId = 43;
  copy.start = 10;
  copy.end = 15;
  Append(copy);
  kernel.name = nullptr;
  Append(kernel);

  const Recorder recorder = Parse();
  EXPECT_THAT(recorder.ids,
              ::testing::ElementsAre(std::make_pair(42u, 0x500000001u)));
  EXPECT_THAT(
      recorder.activities,
      ::testing::ElementsAre(std::make_tuple("gemm", false, 1u, 42u, 1234u),
                             std::make_tuple("memcpy", true, 0u, 43u, 5u),
                             std::make_tuple("", false, 1u, 42u, 1234u)));
}

TEST_F(RealCuptiTest, AnEmptyBufferHoldsNothing) {
  const Recorder recorder = Parse();
  EXPECT_TRUE(recorder.activities.empty());
}

// Of calls, those that launch nothing are left out; what cannot be told is
// kept.
TEST_F(RealCuptiTest, KeepsIdsOfLaunches) {
  CUpti_ActivityExternalCorrelation id = {};
  id.kind = CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION;
  id.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM2;
  CUpti_ActivityAPI api = {};
  const auto append_id = [&](uint32_t correlation) {
    id.correlationId = correlation;
    id.externalId = correlation;
    Append(id);
  };
  const auto append_call = [&](CUpti_ActivityKind kind, uint32_t call,
                               uint32_t correlation) {
    api.kind = kind;
    api.cbid = call;
    api.correlationId = correlation;
    Append(api);
  };
  const CUpti_ActivityKind runtime = CUPTI_ACTIVITY_KIND_RUNTIME;
  const CUpti_ActivityKind driver = CUPTI_ACTIVITY_KIND_DRIVER;
  append_id(1);
  append_call(runtime, CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_v7000, 1);
  append_id(2);
  append_call(runtime, CUPTI_RUNTIME_TRACE_CBID_cudaGetDevice_v3020, 2);
  append_id(3);
  append_call(runtime, CUPTI_RUNTIME_TRACE_CBID_cudaMemcpyAsync_v3020, 3);
  append_id(4);
  append_call(driver, CUPTI_DRIVER_TRACE_CBID_cuLaunchKernelEx, 4);
  append_id(5);
  append_call(driver, CUPTI_DRIVER_TRACE_CBID_cuCtxGetCurrent, 5);
  // Of two threads: the first one's call is not the one behind it.
  append_id(6);
  append_id(7);
  append_call(runtime, CUPTI_RUNTIME_TRACE_CBID_cudaGetDevice_v3020, 7);
  append_call(runtime, CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_v7000, 6);
  append_id(8);
  append_call(runtime, CUPTI_RUNTIME_TRACE_CBID_cudaGetDevice_v3020, 99);
  append_call(runtime, CUPTI_RUNTIME_TRACE_CBID_cudaLaunchKernel_v7000, 8);
  // The library does not know its name.
  append_id(9);
  append_call(runtime, 100'000, 9);
  append_id(10);  // its call stands in another buffer
  std::vector<uint32_t> kept;
  for (const auto& [correlation, external] : Parse().ids) {
    EXPECT_EQ(correlation, external);
    kept.push_back(correlation);
  }
  EXPECT_THAT(kept, ::testing::ElementsAre(1, 3, 4, 6, 8, 9, 10));
}

TEST_F(RealCuptiTest, WithoutAGpuTheAgentTurnsItselfOff) {
  std::string reason;
  if (HasGpu(&reason)) GTEST_SKIP() << "skipped: this machine has a GPU";
  AgentOptions options;
  options.ring_path = ::testing::TempDir() + "/real.ring";
  options.buffers = 2;
  ::testing::internal::CaptureStderr();
  Agent agent(options, std::move(source_), "");
  for (int64_t step = 0; step < 300; ++step) {
    agent.Step(step);
    agent.Push("layer");
    agent.Pop();
  }
  EXPECT_EQ(agent.Status(&reason), PW_CUPTI_OFF);
  EXPECT_THAT(reason, ::testing::HasSubstr("no usable GPU"));
  agent.Stop();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "pipeweaver-cupti: off: " + reason + "\n");
}

}  // namespace
}  // namespace pipeweaver::cupti
