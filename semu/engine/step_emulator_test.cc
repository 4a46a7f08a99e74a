// Times, waits and memory of emulated steps, by hand-made programs. That the
// emulator agrees with schedules is tested in search/plan_evaluator_test.cc.

#include "semu/engine/step_emulator.h"

#include <algorithm>
#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::semu {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using enum StepOpKind;

// Rank 0 computes 10 ns and sends, rank 1 waits and computes 5 ns.
StepProgram OneTransfer() {
  StepProgram program;
  program.ranks = {{{kCompute, 0, 10}, {kPostSend, 0, 0}, {kWaitSend, 0, 0}},
                   {{kPostRecv, 0, 0}, {kWaitRecv, 0, 0}, {kCompute, 0, 5}}};
  program.bytes = {{{7, 0, 1}, {3, 0, 0}, {0, -3, 0}},
                   {{3, 0, 0}, {}, {-3, 0, 20}}};
  program.transfers = {{0, 1, 4, 2}};
  return program;
}

EmulatedStep Emulate(const StepProgram& program, EmulationOptions options) {
  EmulatedStep step;
  const absl::Status status = EmulateStep(program, options, &step);
  EXPECT_TRUE(status.ok()) << status;
  return step;
}

EmulationOptions Contention(bool contention) {
  EmulationOptions options;
  options.contention = contention;
  return options;
}

TEST(StepEmulatorTest, TimesAndWaits) {
  for (bool contention : {false, true}) {
    const EmulatedStep step = Emulate(OneTransfer(), Contention(contention));
    EXPECT_EQ(step.makespan_ns, 10 + 4 + 2 + 5);
    EXPECT_EQ(step.StartNs(1, 1), 0);
    EXPECT_EQ(step.ends_ns[1][1], 16);
    EXPECT_EQ(step.ranks[1].transfer_wait_ns, 16);
    EXPECT_EQ(step.ranks[1].busy_ns, 5);
    EXPECT_EQ(step.ranks[0].busy_ns, 10);
    // A buffered send is not waited for.
    EXPECT_EQ(step.ranks[0].end_ns, contention ? 16 : 10);
  }
}

TEST(StepEmulatorTest, PeaksFollowFromTheOrder) {
  EXPECT_THAT(PeakBytes(OneTransfer()), ElementsAre(10, 20));
}

TEST(StepEmulatorTest, ReceivesPostedLateDelayARendezvous) {
  StepProgram program = OneTransfer();
  program.ranks[1].insert(program.ranks[1].begin(), StepOp(kCompute, 0, 100));
  program.bytes[1].insert(program.bytes[1].begin(), MemoryChange{});
  EXPECT_EQ(Emulate(program, Contention(false)).makespan_ns, 105);
  EXPECT_EQ(Emulate(program, Contention(true)).makespan_ns, 111);
}

TEST(StepEmulatorTest, CopiesRunBesideComputing) {
  StepProgram program;
  program.ranks = {{{kStartCopy, 0, 0},
                    {kStartCopy, 1, 0},
                    {kStartCopy, 2, 0},
                    {kCompute, 0, 10},
                    {kWaitCopy, 2, 0},
                    {kWaitCopy, 1, 0},
                    {kWaitCopy, 0, 0}}};
  program.bytes = {std::vector<MemoryChange>(7)};
  // The second copy to the host waits for the first; the other way does not.
  program.copies = {{0, true, 8}, {0, true, 8}, {0, false, 8}};
  const EmulatedStep step = Emulate(program, Contention(true));
  EXPECT_EQ(step.ends_ns[0][4], 10);
  EXPECT_EQ(step.ends_ns[0][5], 16);
  EXPECT_EQ(step.ranks[0].copy_wait_ns, 6);
  EXPECT_EQ(step.makespan_ns, 10);
  EXPECT_EQ(Emulate(program, Contention(false)).ranks[0].copy_wait_ns, 0);
}

TEST(StepEmulatorTest, NamesRanksThatWaitForEachOther) {
  StepProgram program;
  program.ranks = {{{kPostRecv, 0, 0}, {kWaitRecv, 0, 0}, {kPostSend, 1, 0}},
                   {{kPostRecv, 1, 0}, {kWaitRecv, 1, 0}, {kPostSend, 0, 0}}};
  program.bytes = {std::vector<MemoryChange>(3), std::vector<MemoryChange>(3)};
  program.transfers = {{1, 0, 1, 0}, {0, 1, 1, 0}};
  for (bool contention : {false, true}) {
    EmulatedStep step;
    const absl::Status status =
        EmulateStep(program, Contention(contention), &step);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()),
                HasSubstr("rank 0 at operation 1, rank 1 at operation 1"));
  }
}

TEST(StepEmulatorTest, FactorsOnLinks) {
  EmulationOptions options;
  options.latency_factor = 10;
  options.bandwidth_factor = 0.5;
  EXPECT_EQ(Emulate(OneTransfer(), options).makespan_ns, 10 + 8 + 20 + 5);
}

TEST(StepEmulatorTest, RefusesFactorsThatMakeTimesOverflow) {
  StepProgram program = OneTransfer();
  program.ranks[0][0] = StepOp(kCompute, 0, int64_t{1} << 59);
  program.transfers = {{0, 1, 1'000'000'000'000'000, 1'000'000'000'000}};
  program.copies = {{0, true, 1000}};
  EmulationOptions slow_ports;
  slow_ports.bandwidth_factor = 1e-6;
  EmulationOptions long_links;
  long_links.latency_factor = 1e6;
  EmulationOptions noisy;
  noisy.duration_noise = 1;
  for (bool contention : {false, true}) {
    for (EmulationOptions options : {slow_ports, long_links}) {
      options.contention = contention;
      EmulatedStep step;
      const absl::Status status = EmulateStep(program, options, &step);
      EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
      EXPECT_THAT(std::string(status.message()),
                  HasSubstr(absl::StrCat(
                      "latency_factor: ", options.latency_factor,
                      ", bandwidth_factor: ", options.bandwidth_factor)));
    }
    // Some draws double the 2^59 ns, and are refused; others are below them.
    noisy.contention = contention;
    int refused = 0;
    for (noisy.seed = 0; noisy.seed < 200; ++noisy.seed) {
      EmulatedStep step;
      const absl::Status status = EmulateStep(program, noisy, &step);
      if (!status.ok()) {
        ++refused;
        EXPECT_THAT(std::string(status.message()),
                    HasSubstr("duration_noise: 1, the step's durations"));
        continue;
      }
      EXPECT_GE(step.makespan_ns, 0);
      EXPECT_LT(step.makespan_ns, int64_t{1} << 60);
    }
    EXPECT_GT(refused, 0);
    EXPECT_LT(refused, 100);
  }
}

TEST(StepEmulatorTest, NoiseDependsOnTheSeedAlone) {
  StepProgram program = OneTransfer();
  program.ranks[0][0] = StepOp(kCompute, 0, 1'000'000);
  EmulationOptions options;
  options.duration_noise = 0.1;
  int64_t sum = 0;
  int64_t least = 1'000'000;
  for (uint64_t seed = 0; seed < 1000; ++seed) {
    options.seed = seed;
    const int64_t makespan_ns = Emulate(program, options).makespan_ns;
    EXPECT_EQ(makespan_ns, Emulate(program, options).makespan_ns);
    sum += makespan_ns;
    least = std::min(least, makespan_ns);
  }
  EXPECT_NEAR(static_cast<double>(sum) / 1000, 1'000'000, 15'000);
  EXPECT_LT(least, 800'000);
}

}  // namespace
}  // namespace pipeweaver::semu
