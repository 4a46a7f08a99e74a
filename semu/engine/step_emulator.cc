#include "semu/engine/step_emulator.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/engine/link_ports.h"
#include "semu/engine/queues.h"

namespace pipeweaver::semu {
namespace {

// A well mixed function of its argument (splitmix64, Steele et al. 2014).
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Durations of a disturbed program stay below this in all, so that no time
// overflows: at any time before the end, one of them runs.
constexpr double kMostTotalNs = 0x1p60;

// A random factor of mean 1 before the cut: nearly normal, as the sum of 12
// uniform numbers, which needs no library function that differs by platform.
double NoiseFactor(const EmulationOptions& options, uint64_t place) {
  if (options.duration_noise == 0) return 1;
  double sum = -6;
  for (uint64_t i = 0; i < 12; ++i) {
    sum += static_cast<double>(Mix(Mix(options.seed ^ Mix(place)) + i) >> 11) *
           0x1.0p-53;
  }
  return std::max(0.0, 1 + options.duration_noise * sum);
}

// The program with factors and noise applied.
absl::StatusOr<StepProgram> Disturbed(const StepProgram& program,
                                      const EmulationOptions& options) {
  StepProgram disturbed = program;
  double total_ns = 0;
  const auto scaled = [&total_ns](int64_t duration_ns, double factor) {
    const double ns = static_cast<double>(duration_ns) * factor;
    total_ns += ns;
    return total_ns < kMostTotalNs ? std::llround(ns) : 0;
  };
  uint64_t place = 0;
  for (auto& ops : disturbed.ranks) {
    for (StepOp& op : ops) {
      if (op.kind() == StepOpKind::kCompute) {
        op = StepOp(StepOpKind::kCompute, 0,
                    scaled(op.duration_ns(), NoiseFactor(options, place)));
      }
      ++place;
    }
  }
  for (StepTransfer& x : disturbed.transfers) {
    x.latency_ns = scaled(x.latency_ns, options.latency_factor);
    x.occupancy_ns = scaled(x.occupancy_ns, NoiseFactor(options, place++) /
                                                options.bandwidth_factor);
  }
  for (StepCopy& copy : disturbed.copies) {
    copy.duration_ns = scaled(copy.duration_ns, NoiseFactor(options, place++));
  }
  if (total_ns < kMostTotalNs) return disturbed;
  return absl::InvalidArgumentError(absl::StrCat(
      "latency_factor: ", options.latency_factor, ", bandwidth_factor: ",
      options.bandwidth_factor, ", duration_noise: ", options.duration_noise,
      ", the step's durations add up to ", total_ns,
      " ns with them, must be below 2^60"));
}

absl::Status StuckError(const StepProgram& program,
                        const std::vector<size_t>& position) {
  std::vector<std::string> stuck;
  for (size_t r = 0; r < position.size() && stuck.size() < 4; ++r) {
    if (position[r] < program.ranks[r].size()) {
      stuck.push_back(absl::StrCat("rank ", r, " at operation ", position[r]));
    }
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "step: the ranks wait for each other: ", absl::StrJoin(stuck, ", ")));
}

// Times without contention: each rank runs until it waits for a value that is
// not sent yet, and is resumed by its sender.
absl::Status EmulateFreely(const StepProgram& program, EmulatedStep* result) {
  const size_t ranks = program.ranks.size();
  std::vector<size_t> position(ranks, 0);
  std::vector<int64_t> now(ranks, 0);
  std::vector<int> waits_for(ranks, -1);
  std::vector<int64_t> arrival(program.transfers.size(), -1);
  std::vector<int> runnable;
  for (size_t r = ranks; r-- > 0;) runnable.push_back(static_cast<int>(r));
  while (!runnable.empty()) {
    const int r = runnable.back();
    runnable.pop_back();
    const std::vector<StepOp>& ops = program.ranks[r];
    std::vector<int64_t>& ends_ns = result->ends_ns[r];
    EmulatedStep::Rank& rank = result->ranks[r];
    int64_t now_ns = now[r];
    size_t i = position[r];
    for (; i < ops.size(); ++i) {
      const StepOp& op = ops[i];
      const int64_t start_ns = now_ns;
      if (op.kind() == StepOpKind::kCompute) {
        now_ns += op.duration_ns();
        rank.busy_ns += op.duration_ns();
        result->makespan_ns = std::max(result->makespan_ns, now_ns);
      } else if (op.kind() == StepOpKind::kPostSend) {
        const StepTransfer& x = program.transfers[op.index()];
        arrival[op.index()] = now_ns + x.occupancy_ns + x.latency_ns;
        if (waits_for[x.to_rank] == op.index()) {
          waits_for[x.to_rank] = -1;
          runnable.push_back(x.to_rank);
        }
      } else if (op.kind() == StepOpKind::kWaitRecv) {
        if (arrival[op.index()] < 0) {
          waits_for[r] = op.index();
          break;
        }
        now_ns = std::max(now_ns, arrival[op.index()]);
        rank.transfer_wait_ns += now_ns - start_ns;
      }
      ends_ns[i] = now_ns;
    }
    position[r] = i;
    now[r] = rank.end_ns = now_ns;
  }
  for (size_t r = 0; r < ranks; ++r) {
    if (position[r] < program.ranks[r].size()) {
      return StuckError(program, position);
    }
  }
  return absl::OkStatus();
}

// The event loop.
class Emulator {
 public:
  Emulator(const StepProgram& program, EmulatedStep* result)
      : program_(program),
        result_(*result),
        num_ranks_(static_cast<int>(program.ranks.size())),
        position_(num_ranks_, 0),
        running_(num_ranks_),
        transfer_posts_(program.transfers.size(), 0),
        transfer_waiters_(program.transfers.size(), {-1, -1}),
        copy_ended_(program.copies.size(), 0),
        compute_(num_ranks_, running_),
        links_(num_ranks_, program.transfers),
        copies_(2 * num_ranks_, copy_activities_) {
    for (const StepCopy& copy : program.copies) {
      copy_activities_.push_back(
          {2 * copy.rank + (copy.to_host ? 1 : 0), copy.duration_ns});
    }
    for (int r = 0; r < num_ranks_; ++r) running_[r].unit = r;
  }

  absl::Status Run() {
    for (int r = 0; r < num_ranks_; ++r) RunRank(r);
    while (true) {
      const int64_t compute_ns = compute_.NextEventNs(now_ns_);
      const int64_t links_ns = links_.NextEventNs(now_ns_);
      const int64_t copies_ns = copies_.NextEventNs(now_ns_);
      now_ns_ = std::min({compute_ns, links_ns, copies_ns});
      if (now_ns_ == kNever) break;
      for (std::vector<int>& ended : ended_) ended.clear();
      if (compute_ns == now_ns_) {
        compute_.AdvanceTo(now_ns_, &ended_[kCompute]);
      }
      if (links_ns == now_ns_) links_.AdvanceTo(now_ns_, &ended_[kLinks]);
      if (copies_ns == now_ns_) copies_.AdvanceTo(now_ns_, &ended_[kCopies]);
      for (int r : ended_[kCompute]) EndOp(r);
      for (int t : ended_[kLinks]) {
        transfer_posts_[t] = kTransferEnded;
        for (int r : transfer_waiters_[t]) {
          if (r >= 0) EndOp(r);
        }
      }
      for (int c : ended_[kCopies]) {
        copy_ended_[c] = 1;
        const int r = program_.copies[c].rank;
        const size_t at = position_[r];
        const std::vector<StepOp>& ops = program_.ranks[r];
        if (at < ops.size() && ops[at].kind() == StepOpKind::kWaitCopy &&
            ops[at].index() == c) {
          EndOp(r);
        }
      }
    }
    for (int r = 0; r < num_ranks_; ++r) {
      if (position_[r] < program_.ranks[r].size()) {
        return StuckError(program_, position_);
      }
    }
    return absl::OkStatus();
  }

 private:
  enum { kCompute, kLinks, kCopies, kNumResources };
  static constexpr int kTransferEnded = 3;

  // Ends the operation in which the rank is, and runs on.
  void EndOp(int r) {
    const StepOp& op = program_.ranks[r][position_[r]];
    const int64_t took_ns = now_ns_ - result_.StartNs(r, position_[r]);
    result_.ends_ns[r][position_[r]] = now_ns_;
    EmulatedStep::Rank& rank = result_.ranks[r];
    if (op.kind() == StepOpKind::kCompute) {
      rank.busy_ns += took_ns;
      result_.makespan_ns = std::max(result_.makespan_ns, now_ns_);
    } else if (op.kind() == StepOpKind::kWaitCopy) {
      rank.copy_wait_ns += took_ns;
    } else {
      rank.transfer_wait_ns += took_ns;
    }
    ++position_[r];
    RunRank(r);
  }

  // Runs the rank's operations up to one that takes time.
  void RunRank(int r) {
    const std::vector<StepOp>& ops = program_.ranks[r];
    std::vector<int64_t>& ends_ns = result_.ends_ns[r];
    for (size_t& at = position_[r]; at < ops.size(); ++at) {
      const StepOp& op = ops[at];
      ends_ns[at] = now_ns_;
      switch (op.kind()) {
        case StepOpKind::kCompute:
          running_[r].duration_ns = op.duration_ns();
          compute_.Start(now_ns_, r);
          return;
        case StepOpKind::kPostSend:
        case StepOpKind::kPostRecv:
          if (++transfer_posts_[op.index()] == 2) {
            links_.Start(now_ns_, op.index());
          }
          break;
        case StepOpKind::kWaitSend:
        case StepOpKind::kWaitRecv:
          if (transfer_posts_[op.index()] == kTransferEnded) break;
          transfer_waiters_[op.index()][op.kind() == StepOpKind::kWaitRecv] = r;
          return;
        case StepOpKind::kStartCopy:
          copies_.Start(now_ns_, op.index());
          break;
        case StepOpKind::kWaitCopy:
          if (copy_ended_[op.index()]) break;
          return;
        case StepOpKind::kMark:
          break;
      }
    }
    result_.ranks[r].end_ns = now_ns_;
  }

  const StepProgram& program_;
  EmulatedStep& result_;
  const int num_ranks_;
  int64_t now_ns_ = 0;
  std::vector<size_t> position_;           // [rank]
  std::vector<Queues::Activity> running_;  // [rank]: its compute operation
  std::vector<uint8_t> transfer_posts_;    // [transfer]: or kTransferEnded
  std::vector<std::array<int, 2>> transfer_waiters_;  // [transfer]: ranks
  std::vector<uint8_t> copy_ended_;                   // [copy]
  std::vector<Queues::Activity> copy_activities_;     // [copy]
  Queues compute_;
  LinkPorts links_;
  Queues copies_;
  std::array<std::vector<int>, kNumResources> ended_;
};

}  // namespace

absl::Status EmulateStep(const StepProgram& program,
                         const EmulationOptions& options,
                         EmulatedStep* result) {
  PW_CHECK(options.latency_factor > 0 && options.bandwidth_factor > 0 &&
           options.duration_noise >= 0);
  result->makespan_ns = 0;
  result->ranks.assign(program.ranks.size(), {});
  result->ends_ns.resize(program.ranks.size());
  for (size_t r = 0; r < program.ranks.size(); ++r) {
    result->ends_ns[r].resize(program.ranks[r].size());
  }
  const auto run = [&](const StepProgram& p) {
    return options.contention ? Emulator(p, result).Run()
                              : EmulateFreely(p, result);
  };
  if (options.latency_factor == 1 && options.bandwidth_factor == 1 &&
      options.duration_noise == 0) {
    return run(program);
  }
  PW_ASSIGN_OR_RETURN(const StepProgram disturbed, Disturbed(program, options));
  return run(disturbed);
}

std::vector<int64_t> PeakBytes(const StepProgram& program) {
  PW_CHECK(program.bytes.size() == program.ranks.size());
  std::vector<int64_t> peaks(program.ranks.size(), 0);
  for (size_t r = 0; r < program.ranks.size(); ++r) {
    const std::vector<StepOp>& ops = program.ranks[r];
    const std::vector<MemoryChange>& changes = program.bytes[r];
    PW_CHECK(changes.size() == ops.size());
    int64_t live = 0;
    for (size_t i = 0; i < ops.size(); ++i) {
      live += changes[i].at_start;
      const StepOpKind kind = ops[i].kind();
      if (kind == StepOpKind::kCompute || kind == StepOpKind::kPostSend ||
          kind == StepOpKind::kPostRecv || kind == StepOpKind::kStartCopy) {
        peaks[r] = std::max(peaks[r], live + changes[i].transient);
      }
      live += changes[i].at_end;
    }
  }
  return peaks;
}

}  // namespace pipeweaver::semu
