// How many stages the emulator runs a second, on one core.
//
//   bazel run -c opt //semu/engine:step_emulator_benchmark
//
// The workload: 1F1B over 16 ranks, with 32 stages (forwards and backwards) a
// microbatch, every value between ranks a transfer. `items_per_second` counts
// stages; arguments: whether transfers contend, microbatches.

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
    program_.ranks[r].push_back({kind, index, duration_ns});
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

void BM_Emulate(benchmark::State& state) {
  const OneForwardOneBackward workload(static_cast<int>(state.range(1)));
  EmulationOptions options;
  options.contention = state.range(0) != 0;
  EmulatedStep step;
  for (auto _ : state) {
    PW_CHECK(EmulateStep(workload.program(), options, &step).ok());
    benchmark::DoNotOptimize(step.makespan_ns);
  }
  state.SetItemsProcessed(state.iterations() * workload.stages());
  state.SetLabel(options.contention ? "contention and memory"
                                    : "no contention, memory");
}
// 10^4 and 10^6 stages.
BENCHMARK(BM_Emulate)->ArgsProduct({{0, 1}, {314, 31400}});

}  // namespace
}  // namespace pipeweaver::semu
