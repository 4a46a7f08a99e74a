// How many stages the emulator runs a second, on one core.
//
//   bazel run -c opt //semu/engine:step_emulator_benchmark
//
// The workload: 1F1B over 16 ranks, with 32 stages (forwards and backwards) a
// microbatch, every value between ranks a transfer; 10^4 stages and 10^6 in
// turn, so that the cost of a stage of the one over the other's is known on a
// machine that others load, too. Counters: stages a second of each, that ratio.

#include <time.h>

#include <vector>

#include "benchmark/benchmark.h"
#include "semu/base/check.h"
#include "semu/engine/step_emulator.h"

namespace pipeweaver::semu {
namespace {

constexpr int kRanks = 16;

// Builds the program in the order of a unit-time simulation.
class OneForwardOneBackward {
 public:
  explicit OneForwardOneBackward(int microbatches) {
    program_.ranks.resize(kRanks);
    program_.bytes.resize(kRanks);
    std::vector<int> forwards(kRanks, 0);
    std::vector<int> backwards(kRanks, 0);
    // [rank]: transfers made for it, not received yet, per direction.
    std::vector<std::vector<int>> down(kRanks), up(kRanks);
    for (bool any = true; any;) {
      any = false;
      for (int r = 0; r < kRanks; ++r) {
        const bool last = r == kRanks - 1;
        const bool may_backward =
            backwards[r] <
            (last ? forwards[r] : static_cast<int>(up[r].size()));
        const bool may_forward =
            forwards[r] < microbatches &&
            forwards[r] - backwards[r] < kRanks - r &&
            (r == 0 || forwards[r] < static_cast<int>(down[r].size()));
        if (may_backward) {
          if (!last) Receive(r, up[r][backwards[r]]);
          Compute(r, 200'000 + 1'000 * (backwards[r] % 7), false);
          if (r > 0) up[r - 1].push_back(Send(r, r - 1));
          ++backwards[r];
          any = true;
        } else if (may_forward) {
          if (r > 0) Receive(r, down[r][forwards[r]]);
          Compute(r, 100'000 + 1'000 * (forwards[r] % 5), true);
          if (!last) down[r + 1].push_back(Send(r, r + 1));
          ++forwards[r];
          any = true;
        }
      }
    }
    for (int r = 0; r < kRanks; ++r) WaitSends(r);
  }

  const StepProgram& program() const { return program_; }
  int64_t stages() const { return stages_; }

 private:
  void Add(int r, StepOpKind kind, int index, int64_t duration_ns,
           MemoryChange change) {
    program_.ranks[r].emplace_back(kind, index, duration_ns);
    program_.bytes[r].push_back(change);
  }
  void Compute(int r, int64_t duration_ns, bool forward) {
    Add(r, StepOpKind::kCompute, 0, duration_ns,
        forward ? MemoryChange{100, 0, 0} : MemoryChange{-100, 0, 120});
    ++stages_;
  }
  void WaitSends(int r) {
    for (int t : unwaited_[r]) Add(r, StepOpKind::kWaitSend, t, 0, {0, -10, 0});
    unwaited_[r].clear();
  }
  int Send(int r, int to) {
    WaitSends(r);
    const int t = static_cast<int>(program_.transfers.size());
    program_.transfers.push_back({r, to, 20'000, 5'000});
    Add(r, StepOpKind::kPostSend, t, 0, {10, 0, 0});
    Add(to, StepOpKind::kPostRecv, t, 0, {10, 0, 0});
    unwaited_[r].push_back(t);
    return t;
  }
  void Receive(int r, int t) {
    Add(r, StepOpKind::kWaitRecv, t, 0, {0, -10, 0});
  }

  StepProgram program_;
  std::vector<int> unwaited_[kRanks];
  int64_t stages_ = 0;
};

// CPU time of this thread: what others do on the machine counts less.
double ThreadSeconds() {
  timespec time;
  PW_CHECK(clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time) == 0);
  return static_cast<double>(time.tv_sec) +
         1e-9 * static_cast<double>(time.tv_nsec);
}

struct Answers {
  bool contention = false;
  bool memory = false;
};

// One size of the workload, and what it took so far.
class Run {
 public:
  explicit Run(int microbatches) : workload_(microbatches) {}

  void Emulate(const Answers& answers, int times) {
    EmulationOptions options;
    options.contention = answers.contention;
    const double start = ThreadSeconds();
    for (int i = 0; i < times; ++i) {
      PW_CHECK(EmulateStep(workload_.program(), options, &step_).ok());
      benchmark::DoNotOptimize(step_.makespan_ns);
      if (!answers.memory) continue;
      benchmark::DoNotOptimize(PeakBytes(workload_.program()));
    }
    seconds_ += ThreadSeconds() - start;
    stages_ += times * workload_.stages();
  }
  void Forget() {
    seconds_ = 0;
    stages_ = 0;
  }
  double stages_a_second() const {
    return static_cast<double>(stages_) / seconds_;
  }

 private:
  const OneForwardOneBackward workload_;
  EmulatedStep step_;
  double seconds_ = 0;
  int64_t stages_ = 0;
};

void BM_Emulate(benchmark::State& state, const Answers& answers) {
  constexpr int kTimes = 100;
  Run small(314);
  Run large(314 * kTimes);
  for (Run* run : {&small, &large}) {
    run->Emulate(answers, 1);  // whose memory the others use again
    run->Forget();
  }
  for (auto _ : state) {
    small.Emulate(answers, kTimes);
    large.Emulate(answers, 1);
  }
  state.counters["stages/s_1e4"] = small.stages_a_second();
  state.counters["stages/s_1e6"] = large.stages_a_second();
  state.counters["cost_1e6/1e4"] =
      small.stages_a_second() / large.stages_a_second();
}
BENCHMARK_CAPTURE(BM_Emulate, times, {});
BENCHMARK_CAPTURE(BM_Emulate, times_memory, {.memory = true});
BENCHMARK_CAPTURE(BM_Emulate, contention_memory,
                  {.contention = true, .memory = true});

}  // namespace
}  // namespace pipeweaver::semu
