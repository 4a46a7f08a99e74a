// The agent's whole life against the stand-in for libcupti.

#include "profiler/cupti/agent.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "profiler/cupti/cupti_source.h"
#include "profiler/cupti/testing/fake_cupti.h"

namespace pipeweaver::cupti {
namespace {

using ::testing::HasSubstr;

constexpr char kFakeLibrary[] = "profiler/cupti/testing/libfake_cupti.so";

// The controls, out of the library that the agent loads.
template <typename Function>
Function* Control(Function*, const char* name) {
  void* library = dlopen(kFakeLibrary, RTLD_NOW);
  EXPECT_NE(library, nullptr) << dlerror();
  return reinterpret_cast<Function*>(dlsym(library, name));
}
#define FAKE(name) Control(static_cast<decltype(&(name))>(nullptr), #name)

AgentOptions TestOptions() {
  AgentOptions options;
  options.ring_path = ::testing::TempDir() + "/agent.ring";
  options.ring_slots = 64;
  options.active_steps = 2;
  options.period_steps = 5;
  options.buffers = 4;
  options.buffer_bytes = 64 << 10;
  options.grace_ms = 1;
  return options;
}

class AgentTest : public ::testing::Test {
 protected:
  void SetUp() override {
    FAKE(fake_cupti_fail)(0);
    FAKE(fake_cupti_other_subscriber)(0);
  }

  std::unique_ptr<Agent> Start(const AgentOptions& options) {
    std::string reason;
    std::unique_ptr<ActivitySource> source = OpenCupti(kFakeLibrary, &reason);
    EXPECT_NE(source, nullptr) << reason;
    auto agent = std::make_unique<Agent>(options, std::move(source), reason);
    EXPECT_TRUE(reader_.Open(options.ring_path, &reason)) << reason;
    return agent;
  }

  static pw_cupti_state StateOf(Agent& agent) {
    std::string reason;
    return agent.Status(&reason);
  }

  // Everything the agent wrote, once it stopped, summed over equal keys.
  std::vector<AgentRecord> StopAndRead(Agent& agent) {
    agent.Stop();
    std::vector<AgentRecord> records;
    AgentRecord record;
    while (reader_.Read(&record)) {
      const auto same = std::find_if(
          records.begin(), records.end(), [&](const AgentRecord& r) {
            return r.step == record.step && r.kind == record.kind &&
                   std::string(r.annotation) == record.annotation &&
                   std::string(r.name) == record.name;
          });
      if (same == records.end()) {
        records.push_back(record);
      } else {
        same->count += record.count;
        same->total_ns += record.total_ns;
      }
    }
    return records;
  }

  RingReader reader_;
};

MATCHER_P5(Is, step, annotation, name, count, total_ns, "") {
  return arg.step == step && std::string(arg.annotation) == annotation &&
         std::string(arg.name) == name &&
         arg.count == static_cast<uint64_t>(count) &&
         arg.total_ns == static_cast<uint64_t>(total_ns);
}

TEST_F(AgentTest, TracesItsShareOfTheStepsAndSumsByAnnotation) {
  const std::unique_ptr<Agent> agent = Start(TestOptions());
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_IDLE);
  const auto launch = FAKE(fake_cupti_launch);
  for (int64_t step = 100; step < 107; ++step) {
    agent->Step(step);
    const bool traced = step < 102 || step >= 105;
    EXPECT_EQ(StateOf(*agent), traced ? PW_CUPTI_ACTIVE : PW_CUPTI_IDLE)
        << step;
    EXPECT_EQ(FAKE(fake_cupti_enabled_kinds)(), traced ? 5 : 0) << step;
    agent->Push("layer0");
    launch("gemm", 100, 0);
    launch("gemm", 300, 0);
    agent->Push("inner");
    launch("norm", 7, 0);
    agent->Pop();
    launch("gemm", 50, 0);
    agent->Pop();
    if (step == 101) {
      launch("outside", 9, 0);
      FAKE(fake_cupti_copy)(11);
    }
  }
  EXPECT_EQ(FAKE(fake_cupti_stack_depth)(), 0);
  const std::vector<AgentRecord> records = StopAndRead(*agent);
  EXPECT_THAT(
      records,
      ::testing::UnorderedElementsAre(
          Is(100, "layer0", "gemm", 3, 450), Is(100, "inner", "norm", 1, 7),
          Is(101, "layer0", "gemm", 3, 450), Is(101, "inner", "norm", 1, 7),
          Is(-1, "", "outside", 1, 9), Is(-1, "", "memcpy", 1, 11),
          Is(105, "layer0", "gemm", 3, 450), Is(105, "inner", "norm", 1, 7),
          Is(106, "layer0", "gemm", 3, 450), Is(106, "inner", "norm", 1, 7)));
  const AgentRecord& gemm =
      *std::find_if(records.begin(), records.end(),
                    [](const AgentRecord& r) { return r.name[0] == 'g'; });
  EXPECT_EQ(gemm.device, 3u);
  EXPECT_EQ(gemm.min_ns, 50u);
  EXPECT_EQ(gemm.max_ns, 300u);
  EXPECT_EQ(reader_.header().traced_steps, 4u);
  EXPECT_EQ(reader_.header().lost_activities, 0u);
  EXPECT_EQ(reader_.header().state, static_cast<uint32_t>(PW_CUPTI_OFF));
  EXPECT_NE(access(TestOptions().ring_path.c_str(), F_OK), 0)
      << "the name is gone";
}

TEST_F(AgentTest, HoldsIdsOfLaunchesOnly) {
  for (const bool named : {true, false}) {
    FAKE(fake_cupti_name_apis)(named);
    AgentOptions options = TestOptions();
    options.max_pending = 5;
    options.grace_ms = 3'600'000;  // written out at the end only
    const std::unique_ptr<Agent> agent = Start(options);
    agent->Step(0);
    agent->Push("layer");
    for (int i = 0; i < 20; ++i) FAKE(fake_cupti_ask)();
    FAKE(fake_cupti_launch)("gemm", 10, 0);
    agent->Pop();
    const std::vector<AgentRecord> records = StopAndRead(*agent);
    // Of calls without names any may be a launch: there are too many.
    EXPECT_THAT(records,
                ::testing::ElementsAre(named ? Is(0, "layer", "gemm", 1, 10)
                                             : Is(-1, "", "gemm", 1, 10)));
    EXPECT_EQ(reader_.header().lost_activities, named ? 0u : 16u);
  }
  FAKE(fake_cupti_name_apis)(1);
}

TEST_F(AgentTest, AKernelBelongsToTheStepThatLaunchedIt) {
  const std::unique_ptr<Agent> agent = Start(TestOptions());
  agent->Step(0);
  agent->Push("slow");
  FAKE(fake_cupti_launch)("late", 40, /*running=*/1);
  agent->Pop();
  for (int64_t step = 1; step < 4; ++step) agent->Step(step);
  FAKE(fake_cupti_finish)();
  EXPECT_THAT(StopAndRead(*agent),
              ::testing::ElementsAre(Is(0, "slow", "late", 1, 40)));
}

TEST_F(AgentTest, PushesOfUntracedStepsLeaveNothingBehind) {
  const std::unique_ptr<Agent> agent = Start(TestOptions());
  agent->Pop();  // without a push
  agent->Push("before the first step");
  agent->Step(0);
  agent->Push("a");
  agent->Step(1);
  agent->Step(2);  // the window ends inside "a"
  agent->Push("b");
  EXPECT_EQ(FAKE(fake_cupti_stack_depth)(), 1);
  agent->Pop();
  agent->Pop();
  agent->Pop();
  EXPECT_EQ(FAKE(fake_cupti_stack_depth)(), 0);
  // Deeper than the flags reach.
  agent->Step(5);
  for (int i = 0; i < 100; ++i) agent->Push("deep");
  for (int i = 0; i < 100; ++i) agent->Pop();
  EXPECT_EQ(FAKE(fake_cupti_stack_depth)(), 0);
}

TEST_F(AgentTest, GivesWayToAnotherClientAndComesBack) {
  const std::unique_ptr<Agent> agent = Start(TestOptions());
  const auto other = FAKE(fake_cupti_other_subscriber);
  // There before us.
  other(1);
  agent->Step(0);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_YIELDED);
  EXPECT_EQ(FAKE(fake_cupti_enabled_kinds)(), 0);
  other(0);
  agent->Step(1);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_ACTIVE);
  agent->Step(2);
  // Comes while we trace: its kinds must stay on.
  agent->Step(5);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_ACTIVE);
  other(1);
  agent->Step(6);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_YIELDED);
  EXPECT_EQ(FAKE(fake_cupti_enabled_kinds)(), 5);
  agent->Push("x");
  EXPECT_EQ(FAKE(fake_cupti_stack_depth)(), 0);
  agent->Pop();
  other(0);
  agent->Step(7);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_IDLE);
  agent->Step(10);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_ACTIVE);
  agent->Step(12);
  EXPECT_EQ(FAKE(fake_cupti_enabled_kinds)(), 0);
  EXPECT_EQ(reader_.header().yields, 2u);
}

TEST_F(AgentTest, DetachFreesCuptiAtOnce) {
  const std::unique_ptr<Agent> agent = Start(TestOptions());
  agent->Step(0);
  FAKE(fake_cupti_launch)("k", 5, 0);
  agent->Detach();
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_YIELDED);
  EXPECT_EQ(FAKE(fake_cupti_enabled_kinds)(), 0);
  EXPECT_EQ(FAKE(fake_cupti_open_buffers)(), 0)
      << "no buffer of ours may come back later";
  EXPECT_EQ(reader_.header().yields, 1u) << "the step is not traced whole";
  agent->Step(1);
  agent->Step(5);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_YIELDED);
  agent->Attach();
  agent->Step(6);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_ACTIVE);
  EXPECT_THAT(StopAndRead(*agent),
              ::testing::ElementsAre(Is(-1, "", "k", 1, 5)));
}

TEST_F(AgentTest, TurnsItselfOffForGoodWithTheReason) {
  for (const auto& [code, text] : std::vector<std::pair<int, std::string>>{
           {35, "no right to trace: see NVreg_RestrictProfilingToAdminUsers"},
           {999, "no usable GPU"}}) {
    const std::unique_ptr<Agent> agent = Start(TestOptions());
    FAKE(fake_cupti_fail)(code);
    ::testing::internal::CaptureStderr();
    for (int64_t step = 0; step < 20; ++step) agent->Step(step);
    const std::string said = ::testing::internal::GetCapturedStderr();
    EXPECT_THAT(said, HasSubstr("pipeweaver-cupti: off: cuptiSubscribe"));
    EXPECT_THAT(said, HasSubstr(text));
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << "one line";
    EXPECT_EQ(StateOf(*agent), PW_CUPTI_OFF);
    FAKE(fake_cupti_fail)(0);
    agent->Step(25);
    EXPECT_EQ(StateOf(*agent), PW_CUPTI_OFF);
    EXPECT_EQ(FAKE(fake_cupti_enabled_kinds)(), 0);
  }
}

TEST_F(AgentTest, NoLibraryIsNoHarm) {
  std::string reason;
  EXPECT_EQ(OpenCupti("/nonexistent/libcupti.so", &reason), nullptr);
  EXPECT_THAT(reason, HasSubstr("no libcupti: "));
  EXPECT_EQ(OpenCupti("libm.so.6", &reason), nullptr);
  EXPECT_EQ(reason, "libcupti has no cuptiActivityRegisterCallbacks");
  ::testing::internal::CaptureStderr();
  Agent agent(TestOptions(), nullptr, reason);
  agent.Step(0);
  agent.Push("x");
  agent.Pop();
  agent.Detach();
  agent.Attach();
  EXPECT_EQ(StateOf(agent), PW_CUPTI_OFF);
  agent.Stop();
  EXPECT_EQ(::testing::internal::GetCapturedStderr(),
            "pipeweaver-cupti: off: libcupti has no "
            "cuptiActivityRegisterCallbacks\n");
}

TEST_F(AgentTest, ARingThatCannotBeMadeTurnsItOff) {
  AgentOptions options = TestOptions();
  options.ring_path = "/nonexistent/ring";
  std::string reason;
  ::testing::internal::CaptureStderr();
  Agent agent(options, OpenCupti(kFakeLibrary, &reason), "");
  agent.Step(0);
  EXPECT_EQ(StateOf(agent), PW_CUPTI_OFF);
  EXPECT_EQ(
      ::testing::internal::GetCapturedStderr(),
      "pipeweaver-cupti: off: /nonexistent/ring: No such file or directory\n");
}

TEST_F(AgentTest, CountsWhatIsLost) {
  AgentOptions options = TestOptions();
  options.max_pending = 10;
  options.ring_slots = 2;
  options.grace_ms = 3'600'000;  // written out at the end only
  const std::unique_ptr<Agent> agent = Start(options);
  agent->Step(0);
  agent->Push("layer");
  FAKE(fake_cupti_drop)(1000);
  for (int i = 0; i < 15; ++i) {
    FAKE(fake_cupti_launch)(("k" + std::to_string(i)).c_str(), 1, 0);
  }
  agent->Pop();
  EXPECT_EQ(StopAndRead(*agent).size(), 2u);
  EXPECT_EQ(reader_.header().dropped, 8u) << "ten sums, two slots";
  EXPECT_EQ(reader_.header().lost_activities, 1000u + 5u + 5u)
      << "five kernels, and the ids of five";
}

TEST_F(AgentTest, AnnotationsThatNeverRepeatAreForgottenNotRefused) {
  AgentOptions options = TestOptions();
  options.max_texts = 8;
  options.active_steps = options.period_steps = 1;
  options.ring_slots = 1024;
  options.grace_ms = 3'600'000;  // written out at the end only
  const std::unique_ptr<Agent> agent = Start(options);
  for (int64_t step = 0; step < 20; ++step) {
    agent->Step(step);
    agent->Push("often");
    agent->Push(("pass" + std::to_string(step)).c_str());
    FAKE(fake_cupti_launch)("k", 1, 0);
    agent->Pop();
    agent->Pop();
  }
  int known = 0;
  for (const AgentRecord& record : StopAndRead(*agent)) {
    const std::string annotation = record.annotation;
    if (annotation.empty()) {
      EXPECT_LT(record.step, 16);
      continue;
    }
    ++known;
    EXPECT_EQ(annotation, "pass" + std::to_string(record.step));
  }
  EXPECT_GE(known, 4);
  EXPECT_LE(known, 8);
}

TEST(AnnotationNumbersTest, AnUnknownNumberHasNoText) {
  AnnotationNumbers numbers(4);
  const uint32_t first = numbers.NumberOf("first");
  EXPECT_EQ(numbers.NumberOf("first"), first);
  EXPECT_EQ(numbers.TextOf(first), "first");
  for (const uint32_t number : {0u, first + 1, ~0u}) {
    EXPECT_EQ(numbers.TextOf(number), "");
  }
}

TEST_F(AgentTest, AFloodOfKernelsFromManyThreadsIsSummedWhole) {
  AgentOptions options = TestOptions();
  options.buffers = 2;
  options.buffer_bytes = 4 << 10;
  const std::unique_ptr<Agent> agent = Start(options);
  agent->Step(0);
  const int before = FAKE(fake_cupti_records)();
  const auto launch = FAKE(fake_cupti_launch);
  constexpr int kThreads = 4;
  constexpr int kLaunches = 2000;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&agent, launch, t] {
      const std::string annotation = "thread" + std::to_string(t);
      for (int i = 0; i < kLaunches; ++i) {
        agent->Push(annotation.c_str());
        launch("k", 3, 0);
        agent->Pop();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  // Two ids, an API call and a kernel each.
  EXPECT_EQ(FAKE(fake_cupti_records)() - before, kThreads * kLaunches * 4);
  uint64_t kernels = 0;
  for (const AgentRecord& record : StopAndRead(*agent)) {
    kernels += record.count;
    EXPECT_THAT(record.annotation, HasSubstr("thread"));
    EXPECT_EQ(record.total_ns, 3 * record.count);
  }
  EXPECT_EQ(kernels + reader_.header().lost_activities,
            uint64_t{kThreads} * kLaunches);
  EXPECT_EQ(reader_.header().lost_activities, 0u);
}

TEST_F(AgentTest, TracingWithoutPauseStillWritesOut) {
  AgentOptions options = TestOptions();
  options.active_steps = options.period_steps = 1;
  const std::unique_ptr<Agent> agent = Start(options);
  AgentRecord record;
  bool seen = false;
  const auto deadline =
      std::chrono::steady_clock::now() + std::chrono::seconds(20);
  for (int64_t step = 0; !seen && std::chrono::steady_clock::now() < deadline;
       ++step) {
    agent->Step(step);
    agent->Push("l");
    FAKE(fake_cupti_launch)("k", 1, 0);
    agent->Pop();
    seen = reader_.Read(&record);
    std::this_thread::yield();
  }
  EXPECT_TRUE(seen);
  EXPECT_EQ(StateOf(*agent), PW_CUPTI_ACTIVE);
  EXPECT_EQ(std::string(record.annotation), "l");
}

TEST(RecordRingTest, LongTextsKeepAHash) {
  char field[24];
  CopyText("short", field, sizeof(field));
  EXPECT_STREQ(field, "short");
  CopyText(std::string(23, 'a'), field, sizeof(field));
  EXPECT_EQ(std::string(field), std::string(23, 'a'));
  CopyText(std::string(100, 'a') + "1", field, sizeof(field));
  const std::string one = field;
  CopyText(std::string(100, 'a') + "2", field, sizeof(field));
  EXPECT_NE(one, field);
  EXPECT_EQ(one.size(), 23u);
  EXPECT_EQ(one.substr(0, 7), "aaaaaa~");
  AgentRecord record;
  CopyText("pw:module=" + std::string(300, 'm'), record.annotation,
           sizeof(record.annotation));
  EXPECT_EQ(std::string(record.annotation),
            "pw:module=" + std::string(204, 'm') + "~0852f0792d9d1771");
}

TEST(RecordRingTest, WhatAKilledProcessLeftIsRemoved) {
  const std::string prefix = ::testing::TempDir() + "/left-";
  RingWriter lives;
  ASSERT_TRUE(lives.Open(prefix + "lives", 3));
  // The kernel closes a killed process's files, and unlinks none.
  std::ofstream(prefix + "killed") << "ring";
  std::ofstream(::testing::TempDir() + "/other") << "ring";
  RemoveLeftRings(prefix);
  EXPECT_EQ(access((prefix + "lives").c_str(), F_OK), 0);
  EXPECT_NE(access((prefix + "killed").c_str(), F_OK), 0);
  EXPECT_EQ(access((::testing::TempDir() + "/other").c_str(), F_OK), 0);
  lives.Close();
  RemoveLeftRings("/nonexistent/left-");
}

TEST(RecordRingTest, WrapsAndRefusesForeignFiles) {
  const std::string path = ::testing::TempDir() + "/test.ring";
  RingWriter writer;
  ASSERT_TRUE(writer.Open(path, 3));
  RingReader reader;
  std::string reason;
  ASSERT_TRUE(reader.Open(path, &reason)) << reason;
  AgentRecord record;
  for (uint64_t i = 0; i < 10; ++i) {
    record.count = i;
    writer.Write(record);
    AgentRecord read;
    ASSERT_TRUE(reader.Read(&read));
    EXPECT_EQ(read.count, i);
    EXPECT_FALSE(reader.Read(&read));
  }
  // Neither end believes the other's header.
  writer.header()->slots = uint64_t{1} << 40;
  writer.header()->read = writer.header()->written + 1;
  for (uint64_t i = 0; i < 10; ++i) writer.Write(record);
  writer.header()->written = 1000;
  writer.header()->read = 0;
  int read = 0;
  for (AgentRecord one; reader.Read(&one); ++read) ASSERT_LT(read, 3);
  EXPECT_EQ(read, 3);
  writer.header()->slots = 3;
  writer.header()->record_bytes = 7;
  RingReader foreign;
  EXPECT_FALSE(foreign.Open(path, &reason));
  EXPECT_EQ(reason, "is no ring of activity records");
  writer.Close();
  EXPECT_FALSE(foreign.Open(path, &reason));
  EXPECT_EQ(reason, "No such file or directory");
}

}  // namespace
}  // namespace pipeweaver::cupti
