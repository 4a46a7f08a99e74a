#include "search/lower/testing/rendezvous_executor.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "search/plan/testing/random_problem.h"
#include "semu/base/mutex.h"

namespace pipeweaver::search::testing {
namespace {

// The two ends' posts on a channel, in the order in which each end made them.
struct Channel {
  std::deque<int> posts[2];  // transfers, by end: lower rank first

  bool Matched() const { return !posts[0].empty() && !posts[1].empty(); }
};

using Channels = std::map<std::pair<int, int>, Channel>;

std::pair<int, int> ChannelOf(const Transfer& x) {
  return std::minmax(x.from_rank, x.to_rank);
}

bool IsPost(ActionKind kind) {
  return kind == ActionKind::kPostSend || kind == ActionKind::kPostRecv;
}

bool IsWait(ActionKind kind) {
  return kind == ActionKind::kWaitSend || kind == ActionKind::kWaitRecv;
}

// Takes the first post of both ends off a channel; the transfer that they mean,
// or an error when they mean different ones.
absl::Status Pair(Channel& channel, int* transfer) {
  const int low = channel.posts[0].front();
  const int high = channel.posts[1].front();
  if (low != high) {
    return absl::InternalError(
        absl::StrCat("a channel pairs transfers ", low, " and ", high));
  }
  channel.posts[0].pop_front();
  channel.posts[1].pop_front();
  *transfer = low;
  return absl::OkStatus();
}

// Whether stages find their inputs on their rank.
class Values {
 public:
  explicit Values(const Problem& problem) : problem_(problem) {}

  void Arrived(const Transfer& x) {
    arrived_.insert(
        {x.from_sweep, x.from_stage, x.to_sweep, x.to_stage, x.gradient});
  }

  absl::Status Run(const Action& a) {
    const Sweep& sweep = problem_.sweeps[a.sweep];
    const int last = static_cast<int>(sweep.stages.size()) - 1;
    if (a.kind == ActionKind::kForward) {
      if (a.stage > 0) {
        if (!Has(a, a.sweep, a.stage - 1, false)) return Missing(a);
      } else {
        for (int p : sweep.after) {
          const int end =
              static_cast<int>(problem_.sweeps[p].stages.size()) - 1;
          if (!Has(a, p, end, false)) return Missing(a);
        }
      }
      made_.insert({a.sweep, a.stage, false});
      return absl::OkStatus();
    }
    if (a.kind == ActionKind::kWeightGrad) {
      return made_.count({a.sweep, a.stage, true}) ? absl::OkStatus()
                                                   : Missing(a);
    }
    if (!made_.count({a.sweep, a.stage, false})) return Missing(a);
    if (a.stage < last) {
      if (!Has(a, a.sweep, a.stage + 1, true)) return Missing(a);
    } else {
      for (int c = 0; c < static_cast<int>(problem_.sweeps.size()); ++c) {
        const auto& after = problem_.sweeps[c].after;
        if (std::find(after.begin(), after.end(), a.sweep) != after.end() &&
            !Has(a, c, 0, true)) {
          return Missing(a);
        }
      }
    }
    made_.insert({a.sweep, a.stage, true});
    return absl::OkStatus();
  }

 private:
  // Whether `a` has the value of a stage: made on its rank, or arrived there.
  bool Has(const Action& a, int sweep, int stage, bool gradient) const {
    const int here = problem_.sweeps[a.sweep].stages[a.stage].rank;
    if (problem_.sweeps[sweep].stages[stage].rank == here) {
      return made_.count({sweep, stage, gradient}) > 0;
    }
    return arrived_.count({sweep, stage, a.sweep, a.stage, gradient}) > 0;
  }

  static absl::Status Missing(const Action& a) {
    return absl::InternalError(
        absl::StrCat("sweep ", a.sweep, " stage ", a.stage, " lacks an input"));
  }

  const Problem& problem_;
  std::set<std::tuple<int, int, bool>> made_;
  std::set<std::tuple<int, int, int, int, bool>> arrived_;
};

}  // namespace

absl::Status ExecuteInterleaved(const StepProblem& step,
                                const StepPrograms& programs,
                                std::mt19937_64& random) {
  const int ranks = static_cast<int>(programs.ranks.size());
  std::vector<size_t> position(ranks, 0);
  std::vector<bool> ended(programs.transfers.size(), false);
  Channels channels;
  Values values(step.problem);
  while (true) {
    // Everything that can happen next: a rank's action, a transfer's end.
    std::vector<int> able;
    for (int r = 0; r < ranks; ++r) {
      if (position[r] == programs.ranks[r].size()) continue;
      const Action& a = programs.ranks[r][position[r]];
      if (!IsWait(a.kind) || ended[a.transfer]) able.push_back(r);
    }
    std::vector<Channel*> matched;
    for (auto& [key, channel] : channels) {
      if (channel.Matched()) matched.push_back(&channel);
    }
    const int64_t events = static_cast<int64_t>(able.size() + matched.size());
    if (events == 0) break;
    const size_t pick = static_cast<size_t>(Uniform(random, 0, events - 1));
    if (pick >= able.size()) {
      int transfer = -1;
      if (absl::Status status = Pair(*matched[pick - able.size()], &transfer);
          !status.ok()) {
        return status;
      }
      ended[transfer] = true;
      continue;
    }
    const int r = able[pick];
    const Action& a = programs.ranks[r][position[r]++];
    if (IsPost(a.kind)) {
      const Transfer& x = programs.transfers[a.transfer];
      const auto key = ChannelOf(x);
      channels[key].posts[r == key.second].push_back(a.transfer);
    } else if (a.kind == ActionKind::kWaitRecv) {
      values.Arrived(programs.transfers[a.transfer]);
    } else if (IsCompute(a.kind)) {
      if (absl::Status status = values.Run(a); !status.ok()) return status;
    }
  }
  for (int r = 0; r < ranks; ++r) {
    if (position[r] < programs.ranks[r].size()) {
      return absl::DeadlineExceededError(
          absl::StrCat("rank ", r, " hangs at action ", position[r]));
    }
  }
  return absl::OkStatus();
}

absl::Status ExecuteOnThreads(const StepPrograms& programs) {
  // What the threads share.
  struct Shared {
    Mutex mutex;
    CondVar changed;
    Channels channels ABSL_GUARDED_BY(mutex);
    std::vector<bool> ended ABSL_GUARDED_BY(mutex);
    absl::Status status ABSL_GUARDED_BY(mutex);
  } shared;
  {
    MutexLock lock(&shared.mutex);
    shared.ended.assign(programs.transfers.size(), false);
  }
  const auto run_rank = [&](int r) {
    for (const Action& a : programs.ranks[r]) {
      if (!IsPost(a.kind) && !IsWait(a.kind)) {
        std::this_thread::yield();
        continue;
      }
      MutexLock lock(&shared.mutex);
      if (IsPost(a.kind)) {
        const auto key = ChannelOf(programs.transfers[a.transfer]);
        Channel& channel = shared.channels[key];
        channel.posts[r == key.second].push_back(a.transfer);
        while (channel.Matched() && shared.status.ok()) {
          int transfer = -1;
          shared.status = Pair(channel, &transfer);
          if (shared.status.ok()) shared.ended[transfer] = true;
        }
        shared.changed.NotifyAll();
        continue;
      }
      const auto deadline =
          std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (!shared.ended[a.transfer] && shared.status.ok()) {
        if (shared.changed.WaitUntil(&shared.mutex, deadline)) {
          shared.status = absl::DeadlineExceededError(
              absl::StrCat("rank ", r, " hangs at transfer ", a.transfer));
          shared.changed.NotifyAll();
        }
      }
      if (!shared.status.ok()) return;
    }
  };
  std::vector<std::thread> threads;
  threads.reserve(programs.ranks.size());
  for (int r = 0; r < static_cast<int>(programs.ranks.size()); ++r) {
    threads.emplace_back(run_rank, r);
  }
  for (std::thread& thread : threads) thread.join();
  MutexLock lock(&shared.mutex);
  return shared.status;
}

}  // namespace pipeweaver::search::testing
