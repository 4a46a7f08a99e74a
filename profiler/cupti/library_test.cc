// The injectable library as a trainer meets it: loaded at run time, used
// through its C interface only.

#include <dlfcn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "gtest/gtest.h"
#include "profiler/cupti/pipeweaver_cupti.h"
#include "profiler/cupti/record_ring.h"
#include "profiler/cupti/testing/fake_cupti.h"

namespace pipeweaver::cupti {
namespace {

void* Open(const char* path) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  EXPECT_NE(library, nullptr) << dlerror();
  return library;
}

#define FUNCTION(library, name) \
  reinterpret_cast<decltype(&(name))>(dlsym(library, #name))

// In a process of its own: an agent is started once.
TEST(LibraryTest, OffWithoutAGpu) {
  if (access("/dev/nvidiactl", F_OK) == 0 || access("/dev/dxg", F_OK) == 0) {
    GTEST_SKIP() << "skipped: this machine has a GPU";
  }
  const pid_t child = fork();
  if (child == 0) {
    void* agent = Open("profiler/cupti/libpipeweaver_cupti.so");
    FUNCTION(agent, pw_cupti_start)();
    FUNCTION(agent, pw_cupti_step)(1);
    char reason[64] = "";
    const pw_cupti_state state =
        FUNCTION(agent, pw_cupti_status)(reason, sizeof(reason));
    const bool said = std::string(reason).find("no CUDA driver") == 0 ||
                      std::string(reason).find("no GPU") == 0;
    _exit(state == PW_CUPTI_OFF && said ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(LibraryTest, LifeInATrainer) {
  const std::string ring = ::testing::TempDir() + "/library.ring";
  setenv("PIPEWEAVER_CUPTI_RING", ring.c_str(), 1);
  setenv("PIPEWEAVER_CUPTI_DUTY", "1/2", 1);
  setenv("PIPEWEAVER_CUPTI_BUFFERS", "2x64", 1);
  setenv("PIPEWEAVER_CUPTI_LIBRARY", "profiler/cupti/testing/libfake_cupti.so",
         1);
  void* agent = Open("profiler/cupti/libpipeweaver_cupti.so");
  void* fake = Open("profiler/cupti/testing/libfake_cupti.so");
  ASSERT_TRUE(agent != nullptr && fake != nullptr);
  const auto step = FUNCTION(agent, pw_cupti_step);
  const auto push = FUNCTION(agent, pw_cupti_push);
  const auto pop = FUNCTION(agent, pw_cupti_pop);
  const auto status = FUNCTION(agent, pw_cupti_status);
  const auto launch = FUNCTION(fake, fake_cupti_launch);

  // Before the start nothing happens.
  char reason[64];
  step(1);
  push("early");
  pop();
  EXPECT_EQ(status(reason, sizeof(reason)), PW_CUPTI_OFF);
  EXPECT_STREQ(reason, "not started");

  EXPECT_EQ(FUNCTION(agent, InitializeInjection)(), 1);
  FUNCTION(agent, pw_cupti_start)();
  EXPECT_EQ(status(nullptr, 0), PW_CUPTI_IDLE);
  RingReader reader;
  std::string why;
  ASSERT_TRUE(reader.Open(ring, &why)) << why;
  step(10);
  EXPECT_EQ(status(nullptr, 0), PW_CUPTI_ACTIVE);
  push("pw:module=m,layer=transformer,pass=forward,tokens=64");
  launch("gemm", 77, 0);

  // A data loader's worker is forked in the middle of a step.
  const pid_t child = fork();
  if (child == 0) {
    push("child");
    launch("child kernel", 5, 0);
    pop();
    step(11);
    FUNCTION(agent, pw_cupti_stop)();
    _exit(status(nullptr, 0) == PW_CUPTI_OFF ? 0 : 1);
  }
  int child_status = -1;
  ASSERT_EQ(waitpid(child, &child_status, 0), child);
  EXPECT_EQ(child_status, 0);
  EXPECT_EQ(access(ring.c_str(), F_OK), 0)
      << "the child must not take the ring away";

  pop();
  push(nullptr);
  pop();
  step(11);
  EXPECT_EQ(status(nullptr, 0), PW_CUPTI_IDLE);
  FUNCTION(agent, pw_cupti_stop)();
  FUNCTION(agent, pw_cupti_stop)();
  AgentRecord record;
  ASSERT_TRUE(reader.Read(&record));
  EXPECT_EQ(record.step, 10);
  EXPECT_EQ(std::string(record.name), "gemm");
  EXPECT_EQ(std::string(record.annotation),
            "pw:module=m,layer=transformer,pass=forward,tokens=64");
  EXPECT_EQ(record.total_ns, 77u);
  EXPECT_FALSE(reader.Read(&record));
  step(12);
  EXPECT_EQ(status(reason, sizeof(reason)), PW_CUPTI_OFF);
  EXPECT_STREQ(reason, "stopped");
  EXPECT_NE(access(ring.c_str(), F_OK), 0);
}

}  // namespace
}  // namespace pipeweaver::cupti
