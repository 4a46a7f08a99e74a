// Work is by stage, not by stage and rank: a group knows only the ranks that it
// stands on, and a stage that ends looks only at those that it feeds.

#include "search/plan/safe_order.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <queue>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

template <typename T>
using LeastFirst = std::priority_queue<T, std::vector<T>, std::greater<T>>;

struct StageRef {
  int sweep = 0;
  int stage = 0;
};

// What a group runs on one rank (rules 2 to 4).
struct Line {
  int rank = 0;
  std::vector<StageRef> stages;  // forwards, then backwards
  size_t forwards = 0;           // of `stages`
  size_t started = 0;            // of `stages`
  int64_t hold_bytes = 0;
  int64_t extra_bytes = 0;
};

// A group of sweeps on its way through the ranks.
struct Group {
  std::vector<int> sweeps;
  std::vector<Line> lines;  // of the ranks that it stands on, ascending
  int stages_left = 0;      // forwards and backwards not ended yet
};

class Builder {
 public:
  explicit Builder(const Problem& problem) : problem_(problem) {}

  absl::StatusOr<Schedule> Run() {
    IndexSweeps();
    FormGroups();
    for (Group& group : groups_) {
      FormLines(group);
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
  Line& LineOf(StageRef s) {
    return groups_[group_of_[s.sweep]].lines[line_of_[Pair(s)]];
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
    const int pairs = first_pair_[n];
    choice_.assign(pairs, 0);
    splits_.assign(pairs, false);
    line_of_.assign(pairs, 0);
    forward_waits_.assign(pairs, 1);
    backward_waits_.assign(pairs, 2);
    for (int s = 0; s < n; ++s) {
      forward_waits_[Pair({s, 0})] =
          static_cast<int>(problem_.sweeps[s].after.size());
      backward_waits_[Pair({s, LastStage(s)})] =
          1 + static_cast<int>(std::count_if(
                  consumers_[s].begin(), consumers_[s].end(),
                  [&](int c) { return problem_.sweeps[c].backward; }));
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
  void FormLines(Group& group) {
    MakeLines(group);
    std::vector<LeastFirst<std::pair<int, int>>> ready(group.lines.size());
    std::vector<int> busy;  // lines with a forward that is ready
    const auto make_ready = [&](int s, int k) {
      const int line = line_of_[Pair({s, k})];
      if (ready[line].empty()) busy.push_back(line);
      ready[line].push({s, k});
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
      for (int line : busy) {
        const auto [s, k] = ready[line].top();
        ready[line].pop();
        group.lines[line].stages.push_back({s, k});
        made.push_back({s, k});
      }
      PW_CHECK(!made.empty());
      std::erase_if(busy, [&](int line) { return ready[line].empty(); });
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
    for (Line& line : group.lines) {
      line.forwards = line.stages.size();
      for (size_t i = line.forwards; i > 0; --i) {
        const StageRef s = line.stages[i - 1];
        if (problem_.sweeps[s.sweep].backward) line.stages.push_back(s);
      }
      group.stages_left += static_cast<int>(line.stages.size());
    }
  }

  // The group's lines, empty still, and line_of_ of its stages.
  void MakeLines(Group& group) {
    std::vector<int> ranks;
    for (int s : group.sweeps) {
      for (const Stage& stage : problem_.sweeps[s].stages) {
        ranks.push_back(stage.rank);
      }
    }
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
    group.lines.resize(ranks.size());
    for (size_t i = 0; i < ranks.size(); ++i) group.lines[i].rank = ranks[i];
    for (int s : group.sweeps) {
      for (int k = 0; k <= LastStage(s); ++k) {
        const auto rank =
            std::lower_bound(ranks.begin(), ranks.end(), StageOf({s, k}).rank);
        line_of_[Pair({s, k})] = static_cast<int>(rank - ranks.begin());
      }
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
    for (Line& line : group.lines) {
      const int64_t limit = problem_.memory_limit_bytes[line.rank];
      int64_t held = 0;
      int64_t peak = 0;
      for (size_t i = 0; i < line.forwards; ++i) {
        const StageRef s = line.stages[i];
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
              "rank ", line.rank, ": one microbatch in flight needs ",
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
      line.hold_bytes = held;
      line.extra_bytes = peak - held;
    }
    return absl::OkStatus();
  }

  // A rank while groups pass.
  struct Rank {
    // Over the groups in flight.
    int64_t hold_bytes = 0;
    std::multiset<int64_t> extra_bytes;
    // Groups whose line's next stage here can start, by what that is.
    LeastFirst<int> ready_forwards;
    LeastFirst<int> ready_backwards;
    // What it runs; -1: it is idle.
    int group = -1;
    StageRef stage;
    bool forward = false;
  };

  // Rule 5, for the group `next_group_`. Ranks that it does not stand on are
  // within their limits already.
  bool MayAdmit() const {
    if (next_group_ == static_cast<int>(groups_.size())) return false;
    if (in_flight_ == 0) return true;
    if (in_flight_ >= 2 * problem_.ranks) return false;
    const std::vector<Line>& lines = groups_[next_group_].lines;
    return std::all_of(lines.begin(), lines.end(), [&](const Line& line) {
      const Rank& rank = ranks_[line.rank];
      int64_t extra = line.extra_bytes;
      if (!rank.extra_bytes.empty()) {
        extra = std::max(extra, *rank.extra_bytes.rbegin());
      }
      return extra <= problem_.memory_limit_bytes[line.rank] - line.hold_bytes -
                          rank.hold_bytes;
    });
  }

  void Admit() {
    const int g = next_group_++;
    ++in_flight_;
    for (const Line& line : groups_[g].lines) {
      ranks_[line.rank].hold_bytes += line.hold_bytes;
      ranks_[line.rank].extra_bytes.insert(line.extra_bytes);
      OfferNext(g, line);
    }
  }

  void Leave(int g) {
    --in_flight_;
    for (const Line& line : groups_[g].lines) {
      Rank& rank = ranks_[line.rank];
      rank.hold_bytes -= line.hold_bytes;
      rank.extra_bytes.erase(rank.extra_bytes.find(line.extra_bytes));
    }
  }

  // Lets the rank start what is next in a line of a group in flight, if that
  // has all inputs. Called when a stage becomes next in its line and when its
  // last input comes: the later of the two offers it, once.
  void OfferNext(int g, const Line& line) {
    if (line.started == line.stages.size()) return;
    const int pair = Pair(line.stages[line.started]);
    const bool forward = line.started < line.forwards;
    if ((forward ? forward_waits_ : backward_waits_)[pair] > 0) return;
    Rank& rank = ranks_[line.rank];
    (forward ? rank.ready_forwards : rank.ready_backwards).push(g);
    touched_.push_back(line.rank);
  }

  // One input of the stage has come.
  void Feed(StageRef s, bool forward) {
    const int pair = Pair(s);
    if (--(forward ? forward_waits_ : backward_waits_)[pair] > 0) return;
    const Line& line = LineOf(s);
    if (line.started == line.stages.size()) return;
    const StageRef next = line.stages[line.started];
    if (next.sweep == s.sweep && next.stage == s.stage &&
        forward == (line.started < line.forwards)) {
      OfferNext(group_of_[s.sweep], line);
    }
  }

  // Feeds what waits for the stage.
  void End(StageRef s, bool forward) {
    const Sweep& sweep = problem_.sweeps[s.sweep];
    if (forward) {
      if (sweep.backward) Feed(s, false);
      if (s.stage < LastStage(s.sweep)) {
        Feed({s.sweep, s.stage + 1}, true);
      } else {
        for (int consumer : consumers_[s.sweep]) Feed({consumer, 0}, true);
      }
    } else if (s.stage > 0) {
      Feed({s.sweep, s.stage - 1}, false);
    } else {
      for (int producer : sweep.after) {
        Feed({producer, LastStage(producer)}, false);
      }
    }
  }

  // Rules 5 and 6.
  void Merge() {
    schedule_.ranks.resize(problem_.ranks);
    ranks_.resize(problem_.ranks);
    LeastFirst<std::pair<int64_t, int>> running;  // end tick, rank
    for (int64_t tick = 0;;) {
      touched_.clear();
      bool left = tick == 0;  // there may be room
      while (!running.empty() && running.top().first == tick) {
        Rank& rank = ranks_[running.top().second];
        touched_.push_back(running.top().second);
        running.pop();
        End(rank.stage, rank.forward);
        if (--groups_[rank.group].stages_left == 0) {
          Leave(rank.group);
          left = true;
        }
        rank.group = -1;
      }
      if (left) {
        while (MayAdmit()) Admit();
      }
      if (in_flight_ == 0) return;
      for (size_t i = 0; i < touched_.size(); ++i) {
        const int r = touched_[i];
        if (ranks_[r].group >= 0 || !Start(r)) continue;
        running.push({tick + (ranks_[r].forward ? 1 : 2), r});
      }
      PW_CHECK(!running.empty());
      tick = running.top().first;
    }
  }

  // Starts what an idle rank runs next; false if that is nothing.
  bool Start(int r) {
    Rank& rank = ranks_[r];
    rank.forward = rank.ready_backwards.empty();
    LeastFirst<int>& ready =
        rank.forward ? rank.ready_forwards : rank.ready_backwards;
    if (ready.empty()) return false;
    rank.group = ready.top();
    ready.pop();
    std::vector<Line>& lines = groups_[rank.group].lines;
    Line& line = *std::lower_bound(
        lines.begin(), lines.end(), r,
        [](const Line& l, int wanted) { return l.rank < wanted; });
    rank.stage = line.stages[line.started++];
    OfferNext(rank.group, line);
    Append(r, rank.stage, rank.forward);
    return true;
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
  std::vector<int> line_of_;                 // [pair]: of its group's lines
  std::vector<int> group_of_;                // [sweep]
  std::vector<Group> groups_;
  std::vector<int> inputs_left_;  // [sweep], scratch of FormLines
  // [pair]: inputs that have not been computed yet.
  std::vector<int> forward_waits_;
  std::vector<int> backward_waits_;
  int next_group_ = 0;  // the first not admitted yet
  int in_flight_ = 0;   // groups
  std::vector<Rank> ranks_;
  std::vector<int>
      touched_;  // ranks that may start something; scratch of Merge
  Schedule schedule_;
};

}  // namespace

absl::StatusOr<Schedule> SafeOrder(const Problem& problem) {
  return Builder(problem).Run();
}

}  // namespace pipeweaver::search
