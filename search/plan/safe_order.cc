#include "search/plan/safe_order.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <queue>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

struct StageRef {
  int sweep = 0;
  int stage = 0;
};

// A group of sweeps on its way through the ranks (rules 1 to 4).
struct Group {
  std::vector<int> sweeps;
  std::vector<std::vector<StageRef>> forwards;   // [rank], in the line's order
  std::vector<std::vector<StageRef>> backwards;  // [rank], in the line's order
  std::vector<int64_t> hold_bytes;               // [rank]
  std::vector<int64_t> extra_bytes;              // [rank]
  int stages_left = 0;  // forwards and backwards not ended yet
};

class Builder {
 public:
  explicit Builder(const Problem& problem) : problem_(problem) {}

  absl::StatusOr<Schedule> Run() {
    IndexSweeps();
    FormGroups();
    for (Group& group : groups_) {
      FormLine(group);
      PW_RETURN_IF_ERROR(PickChoices(group));
    }
    Merge();
    return std::move(schedule_);
  }

 private:
  const Stage& StageOf(StageRef s) const {
    return problem_.sweeps[s.sweep].stages[s.stage];
  }
  int Pair(StageRef s) const { return first_pair_[s.sweep] + s.stage; }
  int LastStage(int sweep) const {
    return static_cast<int>(problem_.sweeps[sweep].stages.size()) - 1;
  }

  void IndexSweeps() {
    const int n = static_cast<int>(problem_.sweeps.size());
    consumers_.resize(n);
    first_pair_.resize(n + 1, 0);
    for (int s = 0; s < n; ++s) {
      const Sweep& sweep = problem_.sweeps[s];
      first_pair_[s + 1] =
          first_pair_[s] + static_cast<int>(sweep.stages.size());
      for (int producer : sweep.after) consumers_[producer].push_back(s);
    }
    choice_.assign(first_pair_[n], 0);
    splits_.assign(first_pair_[n], false);
    for (int s = 0; s < n; ++s) {
      for (int k = 0; k <= LastStage(s); ++k) {
        const ChoiceList& choices = StageOf({s, k}).choices;
        splits_[Pair({s, k})] =
            problem_.split_backward &&
            std::all_of(choices.begin(), choices.end(),
                        [](const Choice& c) { return c.weight_grad_ns > 0; });
      }
    }
  }

  // Rule 1.
  void FormGroups() {
    const int n = static_cast<int>(problem_.sweeps.size());
    group_of_.assign(n, -1);
    std::vector<int> reached;
    for (int root = 0; root < n; ++root) {
      if (group_of_[root] >= 0) continue;
      const int number = static_cast<int>(groups_.size());
      Group& group = groups_.emplace_back();
      group_of_[root] = number;
      reached.assign(1, root);
      while (!reached.empty()) {
        const int s = reached.back();
        reached.pop_back();
        group.sweeps.push_back(s);
        const auto reach = [&](int other) {
          if (group_of_[other] >= 0) return;
          group_of_[other] = number;
          reached.push_back(other);
        };
        for (int other : problem_.sweeps[s].after) reach(other);
        for (int other : consumers_[s]) reach(other);
      }
      std::sort(group.sweeps.begin(), group.sweeps.end());
    }
  }

  // Rule 2.
  void FormLine(Group& group) {
    group.forwards.resize(problem_.ranks);
    group.backwards.resize(problem_.ranks);
    using Ready = std::priority_queue<std::pair<int, int>,
                                      std::vector<std::pair<int, int>>,
                                      std::greater<std::pair<int, int>>>;
    std::vector<Ready> ready(problem_.ranks);
    const auto make_ready = [&](int s, int k) {
      ready[problem_.sweeps[s].stages[k].rank].push({s, k});
    };
    std::vector<int>& inputs_left = inputs_left_;
    inputs_left.resize(problem_.sweeps.size());
    int left = 0;
    for (int s : group.sweeps) {
      inputs_left[s] = static_cast<int>(problem_.sweeps[s].after.size());
      if (inputs_left[s] == 0) make_ready(s, 0);
      left += LastStage(s) + 1;
    }
    std::vector<StageRef> made;
    while (left > 0) {
      made.clear();
      for (int r = 0; r < problem_.ranks; ++r) {
        if (ready[r].empty()) continue;
        const auto [s, k] = ready[r].top();
        ready[r].pop();
        group.forwards[r].push_back({s, k});
        made.push_back({s, k});
      }
      PW_CHECK(!made.empty());
      left -= static_cast<int>(made.size());
      for (StageRef m : made) {
        if (m.stage < LastStage(m.sweep)) {
          make_ready(m.sweep, m.stage + 1);
          continue;
        }
        for (int consumer : consumers_[m.sweep]) {
          if (--inputs_left[consumer] == 0) make_ready(consumer, 0);
        }
      }
    }
    for (int r = 0; r < problem_.ranks; ++r) {
      const std::vector<StageRef>& line = group.forwards[r];
      for (auto it = line.rbegin(); it != line.rend(); ++it) {
        if (problem_.sweeps[it->sweep].backward) {
          group.backwards[r].push_back(*it);
        }
      }
      group.stages_left +=
          static_cast<int>(line.size() + group.backwards[r].size());
    }
  }

  // Rule 3.
  bool RunsFused(StageRef s, const Choice& c) const {
    return splits_[Pair(s)] && c.fused_backward_ns.has_value() &&
           c.fused_backward_bytes <=
               std::max(c.backward_bytes, c.weight_grad_bytes);
  }

  int64_t Need(StageRef s, const Choice& c) const {
    if (!problem_.sweeps[s.sweep].backward) return c.activation_bytes;
    int64_t backward = c.backward_bytes;
    if (RunsFused(s, c)) {
      backward = c.fused_backward_bytes;
    } else if (splits_[Pair(s)]) {
      backward = std::max(c.backward_bytes, c.weight_grad_bytes);
    }
    return std::max(c.activation_bytes, backward);
  }

  // Rule 4.
  absl::Status PickChoices(Group& group) {
    group.hold_bytes.assign(problem_.ranks, 0);
    group.extra_bytes.assign(problem_.ranks, 0);
    for (int r = 0; r < problem_.ranks; ++r) {
      const int64_t limit = problem_.memory_limit_bytes[r];
      int64_t held = 0;
      int64_t peak = 0;
      for (StageRef s : group.forwards[r]) {
        const ChoiceList& choices = StageOf(s).choices;
        int best = -1;
        int64_t least_need = std::numeric_limits<int64_t>::max();
        for (int c = 0; c < static_cast<int>(choices.size()); ++c) {
          const int64_t need = Need(s, choices[c]);
          least_need = std::min(least_need, need);
          if (need > limit - held) continue;
          if (best < 0 || std::make_pair(choices[c].activation_bytes, need) <
                              std::make_pair(choices[best].activation_bytes,
                                             Need(s, choices[best]))) {
            best = c;
          }
        }
        if (best < 0) {
          return absl::ResourceExhaustedError(absl::StrCat(
              "rank ", r, ": one microbatch in flight needs ",
              held + least_need, " bytes at ", problem_.sweeps[s.sweep].id,
              " stage ", s.stage, ", over the limit of ", limit,
              "; the safe order does not fit"));
        }
        choice_[Pair(s)] = best;
        peak = std::max(peak, held + Need(s, choices[best]));
        if (problem_.sweeps[s.sweep].backward) {
          held += choices[best].activation_bytes;
        }
      }
      group.hold_bytes[r] = held;
      group.extra_bytes[r] = peak - held;
    }
    return absl::OkStatus();
  }

  // Rule 5, for the group `next_group_`.
  bool MayAdmit(const std::vector<int>& in_flight) const {
    if (in_flight.empty()) return true;
    if (static_cast<int>(in_flight.size()) >= 2 * problem_.ranks) return false;
    const Group& candidate = groups_[next_group_];
    for (int r = 0; r < problem_.ranks; ++r) {
      int64_t room = problem_.memory_limit_bytes[r] - candidate.hold_bytes[r];
      int64_t extra = candidate.extra_bytes[r];
      for (int g : in_flight) {
        room -= groups_[g].hold_bytes[r];
        extra = std::max(extra, groups_[g].extra_bytes[r]);
      }
      if (extra > room) return false;
    }
    return true;
  }

  bool ForwardReady(StageRef s) const {
    if (s.stage > 0) return forward_done_[Pair({s.sweep, s.stage - 1})];
    const std::vector<int>& after = problem_.sweeps[s.sweep].after;
    return std::all_of(after.begin(), after.end(), [&](int producer) {
      return forward_done_[Pair({producer, LastStage(producer)})];
    });
  }

  bool BackwardReady(StageRef s) const {
    if (!forward_done_[Pair(s)]) return false;
    if (s.stage < LastStage(s.sweep)) {
      return backward_done_[Pair({s.sweep, s.stage + 1})];
    }
    return std::all_of(consumers_[s.sweep].begin(), consumers_[s.sweep].end(),
                       [&](int consumer) {
                         return !problem_.sweeps[consumer].backward ||
                                backward_done_[Pair({consumer, 0})];
                       });
  }

  // What the next stage of a group's line on a rank is.
  enum class Head : uint8_t { kNotReady, kForward, kBackward };

  // The next stage of the line of `g` on rank `r`; false at the line's end.
  bool Next(int g, int r, StageRef* stage, bool* forward) const {
    const Group& group = groups_[g];
    size_t at = position_[g][r];
    *forward = at < group.forwards[r].size();
    if (*forward) {
      *stage = group.forwards[r][at];
      return true;
    }
    at -= group.forwards[r].size();
    if (at == group.backwards[r].size()) return false;
    *stage = group.backwards[r][at];
    return true;
  }

  void UpdateHead(int g, int r) {
    StageRef stage;
    bool forward = false;
    Head head = Head::kNotReady;
    if (Next(g, r, &stage, &forward) &&
        (forward ? ForwardReady(stage) : BackwardReady(stage))) {
      head = forward ? Head::kForward : Head::kBackward;
    }
    ready_heads_[r] +=
        (head != Head::kNotReady) - (heads_[g][r] != Head::kNotReady);
    heads_[g][r] = head;
  }

  // Rules 5 and 6. Only a stage that ends makes others ready, those of its own
  // group; so the heads of lines are looked at again just then.
  void Merge() {
    const int ranks = problem_.ranks;
    schedule_.ranks.assign(ranks, {});
    forward_done_.assign(choice_.size(), false);
    backward_done_.assign(choice_.size(), false);
    position_.resize(groups_.size());
    heads_.resize(groups_.size());
    ready_heads_.assign(ranks, 0);
    struct Running {
      int group = -1;  // -1: the rank is idle
      StageRef stage;
      bool forward = false;
      int64_t end_tick = 0;
    };
    std::vector<Running> running(ranks);
    std::vector<int> in_flight;
    bool may_admit = true;
    int64_t tick = 0;
    while (true) {
      changed_groups_.clear();
      for (int r = 0; r < ranks; ++r) {
        Running& run = running[r];
        if (run.group < 0 || run.end_tick > tick) continue;
        (run.forward ? forward_done_ : backward_done_)[Pair(run.stage)] = true;
        changed_groups_.push_back(run.group);
        if (--groups_[run.group].stages_left == 0) {
          std::erase(in_flight, run.group);
          may_admit = true;
        }
        run.group = -1;
      }
      while (may_admit) {
        may_admit = next_group_ < static_cast<int>(groups_.size()) &&
                    MayAdmit(in_flight);
        if (!may_admit) break;
        position_[next_group_].assign(ranks, 0);
        heads_[next_group_].assign(ranks, Head::kNotReady);
        changed_groups_.push_back(next_group_);
        in_flight.push_back(next_group_++);
      }
      if (in_flight.empty()) return;
      for (int g : changed_groups_) {
        for (int r = 0; r < ranks; ++r) UpdateHead(g, r);
      }
      int64_t next_tick = std::numeric_limits<int64_t>::max();
      for (int r = 0; r < ranks; ++r) {
        Running& run = running[r];
        if (run.group < 0 && ready_heads_[r] > 0) {
          for (int g : in_flight) {
            if (heads_[g][r] == Head::kNotReady) continue;
            if (heads_[g][r] == Head::kForward && run.group >= 0) continue;
            run.group = g;
            if (heads_[g][r] == Head::kBackward) break;
          }
          Next(run.group, r, &run.stage, &run.forward);
          run.end_tick = tick + (run.forward ? 1 : 2);
          ++position_[run.group][r];
          UpdateHead(run.group, r);
          Append(r, run.stage, run.forward);
        }
        if (run.group >= 0) next_tick = std::min(next_tick, run.end_tick);
      }
      PW_CHECK(next_tick != std::numeric_limits<int64_t>::max());
      tick = next_tick;
    }
  }

  void Append(int rank, StageRef s, bool forward) {
    std::vector<ScheduledStage>& order = schedule_.ranks[rank];
    const int choice = choice_[Pair(s)];
    const auto add = [&](StageKind kind) {
      order.push_back({kind, s.sweep, s.stage, choice});
    };
    if (forward) {
      add(StageKind::kForward);
    } else if (!splits_[Pair(s)] || RunsFused(s, StageOf(s).choices[choice])) {
      add(StageKind::kBackward);
    } else {
      add(StageKind::kInputGrad);
      add(StageKind::kWeightGrad);
    }
  }

  const Problem& problem_;
  std::vector<std::vector<int>> consumers_;  // [sweep]
  std::vector<int> first_pair_;              // [sweep], and the number of pairs
  std::vector<int> choice_;                  // [pair]
  std::vector<bool> splits_;                 // [pair]
  std::vector<int> group_of_;                // [sweep]
  std::vector<Group> groups_;
  std::vector<int> inputs_left_;  // [sweep], scratch of FormLine
  int next_group_ = 0;            // the first not admitted yet
  // [group][rank]: how far along its line a group in flight is, and whether
  // what stands next can start.
  std::vector<std::vector<size_t>> position_;
  std::vector<std::vector<Head>> heads_;
  std::vector<int> ready_heads_;     // [rank]: heads that are ready
  std::vector<int> changed_groups_;  // scratch of Merge
  std::vector<bool> forward_done_;   // [pair]
  std::vector<bool> backward_done_;  // [pair]
  Schedule schedule_;
};

}  // namespace

absl::StatusOr<Schedule> SafeOrder(const Problem& problem) {
  return Builder(problem).Run();
}

}  // namespace pipeweaver::search
