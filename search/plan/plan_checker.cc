#include "search/plan/plan_checker.h"

#include <algorithm>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

// What stands of a stage pair in the schedule; the slots of a pair.
enum Slot { kSlotForward = 0, kSlotGradient = 1, kSlotWeight = 2, kSlots = 3 };

Slot SlotOf(StageKind kind) {
  switch (kind) {
    case StageKind::kForward:
      return kSlotForward;
    case StageKind::kBackward:
    case StageKind::kInputGrad:
      return kSlotGradient;
    case StageKind::kWeightGrad:
      return kSlotWeight;
  }
  return kSlotForward;
}

constexpr int64_t kNotRun = -1;

class Checker {
 public:
  Checker(const Problem& problem, const Schedule& schedule)
      : problem_(problem), schedule_(schedule) {}

  absl::StatusOr<CheckedSchedule> Run() {
    IndexProblem();
    PW_RETURN_IF_ERROR(CheckPresence());
    PW_RETURN_IF_ERROR(CheckCompleteness());
    PW_RETURN_IF_ERROR(CheckMemory());
    PW_RETURN_IF_ERROR(Time());
    return std::move(result_);
  }

 private:
  absl::Status Violation(absl::string_view what) const {
    return absl::FailedPreconditionError(absl::StrCat("schedule: ", what));
  }

  std::string Name(char letter, int sweep, int stage) const {
    return absl::StrCat(std::string(1, letter), " of ",
                        problem_.sweeps[sweep].id, " stage ", stage);
  }
  std::string Name(const ScheduledStage& s) const {
    return Name(StageKindLetter(s.kind), s.sweep, s.stage);
  }

  int Pair(int sweep, int stage) const { return first_pair_[sweep] + stage; }

  void IndexProblem() {
    const int num_sweeps = static_cast<int>(problem_.sweeps.size());
    first_pair_.resize(num_sweeps + 1, 0);
    first_consumer_.assign(num_sweeps + 1, 0);
    for (int s = 0; s < num_sweeps; ++s) {
      const Sweep& sweep = problem_.sweeps[s];
      first_pair_[s + 1] =
          first_pair_[s] + static_cast<int>(sweep.stages.size());
      for (int producer : sweep.after) ++first_consumer_[producer + 1];
    }
    for (int s = 0; s < num_sweeps; ++s) {
      first_consumer_[s + 1] += first_consumer_[s];
    }
    consumers_.resize(first_consumer_[num_sweeps]);
    std::vector<int> next(first_consumer_.begin(), first_consumer_.end() - 1);
    for (int s = 0; s < num_sweeps; ++s) {
      for (int producer : problem_.sweeps[s].after) {
        consumers_[next[producer]++] = s;
      }
    }
    const int pairs = first_pair_[num_sweeps];
    choice_.assign(pairs, -1);
    present_.assign(static_cast<size_t>(pairs) * kSlots, false);
    fused_.assign(pairs, false);
    splits_.assign(pairs, false);
    if (!problem_.split_backward) return;
    const Choice* list = nullptr;  // the last looked at; stages share them
    bool list_splits = false;
    int pair = 0;
    for (const Sweep& sweep : problem_.sweeps) {
      for (const Stage& stage : sweep.stages) {
        if (stage.choices.data() != list) {
          list = stage.choices.data();
          list_splits =
              std::all_of(stage.choices.begin(), stage.choices.end(),
                          [](const Choice& c) { return c.weight_grad_ns > 0; });
        }
        splits_[pair++] = list_splits;
      }
    }
  }

  // Every entry is a stage of the problem, on its rank, once, allowed in this
  // form, and with one choice for its pair.
  absl::Status CheckPresence() {
    if (static_cast<int>(schedule_.ranks.size()) != problem_.ranks ||
        static_cast<int>(problem_.memory_limit_bytes.size()) !=
            problem_.ranks) {
      return Violation(absl::StrCat(schedule_.ranks.size(), " rank lists for ",
                                    problem_.ranks, " ranks"));
    }
    for (int r = 0; r < problem_.ranks; ++r) {
      for (const ScheduledStage& s : schedule_.ranks[r]) {
        if (s.sweep < 0 ||
            s.sweep >= static_cast<int>(problem_.sweeps.size()) ||
            s.stage < 0 ||
            s.stage >=
                static_cast<int>(problem_.sweeps[s.sweep].stages.size())) {
          return Violation(absl::StrCat("rank ", r, ": sweep ", s.sweep,
                                        " stage ", s.stage,
                                        " is no stage of the problem"));
        }
        const Stage& stage = problem_.sweeps[s.sweep].stages[s.stage];
        if (stage.rank != r) {
          return Violation(absl::StrCat(Name(s), " belongs on rank ",
                                        stage.rank, ", not ", r));
        }
        if (s.choice < 0 ||
            s.choice >= static_cast<int>(stage.choices.size())) {
          return Violation(absl::StrCat(Name(s), ": choice ", s.choice, " of ",
                                        stage.choices.size()));
        }
        const int pair = Pair(s.sweep, s.stage);
        if (choice_[pair] >= 0 && choice_[pair] != s.choice) {
          return Violation(absl::StrCat(Name(s), ": choice ", s.choice,
                                        ", but ", choice_[pair],
                                        " elsewhere in its pair"));
        }
        choice_[pair] = s.choice;
        const size_t slot = static_cast<size_t>(pair) * kSlots + SlotOf(s.kind);
        if (present_[slot]) {
          return Violation(absl::StrCat(Name(s), " appears twice"));
        }
        present_[slot] = true;
        if (s.kind == StageKind::kForward) continue;
        if (!problem_.sweeps[s.sweep].backward) {
          return Violation(
              absl::StrCat(Name(s), ": the sweep runs forward only"));
        }
        if (s.kind == StageKind::kBackward) {
          if (splits_[pair] &&
              !stage.choices[s.choice].fused_backward_ns.has_value()) {
            return Violation(absl::StrCat(Name(s), ": choice ", s.choice,
                                          " has no fused backward"));
          }
          fused_[pair] = splits_[pair];
        } else if (!splits_[pair]) {
          return Violation(
              absl::StrCat(Name(s), ": this stage's backward is not split"));
        }
        if (s.kind == StageKind::kBackward) whole_backward_.push_back(pair);
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckCompleteness() {
    std::vector<bool> whole(choice_.size(), false);
    for (int pair : whole_backward_) whole[pair] = true;
    for (int s = 0; s < static_cast<int>(problem_.sweeps.size()); ++s) {
      const Sweep& sweep = problem_.sweeps[s];
      for (int k = 0; k < static_cast<int>(sweep.stages.size()); ++k) {
        const int pair = Pair(s, k);
        const size_t slot = static_cast<size_t>(pair) * kSlots;
        if (!present_[slot + kSlotForward]) {
          return Violation(absl::StrCat(Name('F', s, k), " is missing"));
        }
        if (!sweep.backward) continue;
        if (!present_[slot + kSlotGradient]) {
          return Violation(absl::StrCat(Name(splits_[pair] ? 'I' : 'B', s, k),
                                        " is missing"));
        }
        if ((present_[slot + kSlotWeight] != 0) == whole[pair]) {
          return Violation(absl::StrCat(
              Name('W', s, k),
              whole[pair] ? " is not to run beside its B" : " is missing"));
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckMemory() {
    result_.peak_bytes.assign(problem_.ranks, 0);
    for (int r = 0; r < problem_.ranks; ++r) {
      int64_t live = 0;
      int64_t peak = 0;
      for (const ScheduledStage& s : schedule_.ranks[r]) {
        const Sweep& sweep = problem_.sweeps[s.sweep];
        const Choice& c = sweep.stages[s.stage].choices[s.choice];
        switch (s.kind) {
          case StageKind::kForward:
            live += c.activation_bytes;
            peak = std::max(peak, live);
            if (!sweep.backward) live -= c.activation_bytes;
            break;
          case StageKind::kBackward:
            live -= c.activation_bytes;
            peak = std::max(peak, live + (fused_[Pair(s.sweep, s.stage)]
                                              ? c.fused_backward_bytes
                                              : c.backward_bytes));
            break;
          case StageKind::kInputGrad:
            live -= c.activation_bytes;
            peak = std::max(peak, live + c.backward_bytes);
            live += c.weight_grad_bytes;
            peak = std::max(peak, live);
            break;
          case StageKind::kWeightGrad:
            live -= c.weight_grad_bytes;
            break;
        }
        if (peak > problem_.memory_limit_bytes[r]) {
          return Violation(absl::StrCat(
              "rank ", r, ": ", peak, " bytes live at ", Name(s),
              ", over the limit of ", problem_.memory_limit_bytes[r]));
        }
      }
      result_.peak_bytes[r] = peak;
    }
    return absl::OkStatus();
  }

  int64_t Duration(const ScheduledStage& s) const {
    const Choice& c =
        problem_.sweeps[s.sweep].stages[s.stage].choices[s.choice];
    switch (s.kind) {
      case StageKind::kForward:
        return c.forward_ns;
      case StageKind::kBackward:
        return fused_[Pair(s.sweep, s.stage)]
                   ? *c.fused_backward_ns
                   : c.input_grad_ns + c.weight_grad_ns;
      case StageKind::kInputGrad:
        return c.input_grad_ns;
      case StageKind::kWeightGrad:
        return c.weight_grad_ns;
    }
    return 0;
  }

  // Takes the arrival of a value into account; false when it is not made yet,
  // and then blocked_on_ names it.
  bool Arrives(int sweep, int stage, Slot slot, int64_t transfer_ns, int rank,
               int64_t* arrival) {
    const int task = Pair(sweep, stage) * kSlots + slot;
    if (end_[task] == kNotRun) {
      blocked_on_ = task;
      return false;
    }
    const bool crosses = problem_.sweeps[sweep].stages[stage].rank != rank;
    *arrival = std::max(*arrival, end_[task] + (crosses ? transfer_ns : 0));
    return true;
  }

  bool InputsArrive(const ScheduledStage& s, int rank, int64_t* arrival) {
    const Sweep& sweep = problem_.sweeps[s.sweep];
    const int last = static_cast<int>(sweep.stages.size()) - 1;
    switch (s.kind) {
      case StageKind::kForward:
        if (s.stage > 0) {
          return Arrives(s.sweep, s.stage - 1, kSlotForward,
                         sweep.stages[s.stage - 1].transfer_ns, rank, arrival);
        }
        for (int producer : sweep.after) {
          const int end =
              static_cast<int>(problem_.sweeps[producer].stages.size()) - 1;
          if (!Arrives(producer, end, kSlotForward,
                       problem_.sweeps[producer].stages[end].transfer_ns, rank,
                       arrival)) {
            return false;
          }
        }
        return true;
      case StageKind::kBackward:
      case StageKind::kInputGrad: {
        if (!Arrives(s.sweep, s.stage, kSlotForward, 0, rank, arrival)) {
          return false;
        }
        const int64_t transfer_ns = sweep.stages[s.stage].transfer_ns;
        if (s.stage < last) {
          return Arrives(s.sweep, s.stage + 1, kSlotGradient, transfer_ns, rank,
                         arrival);
        }
        for (int i = first_consumer_[s.sweep]; i < first_consumer_[s.sweep + 1];
             ++i) {
          if (problem_.sweeps[consumers_[i]].backward &&
              !Arrives(consumers_[i], 0, kSlotGradient, transfer_ns, rank,
                       arrival)) {
            return false;
          }
        }
        return true;
      }
      case StageKind::kWeightGrad:
        return Arrives(s.sweep, s.stage, kSlotGradient, 0, rank, arrival);
    }
    return true;
  }

  // Runs every rank as far as it gets; a rank that waits is resumed by the
  // stage it waits for.
  absl::Status Time() {
    const int ranks = problem_.ranks;
    end_.assign(choice_.size() * kSlots, kNotRun);
    std::vector<int> first_waiter(end_.size(), -1);
    std::vector<int> next_waiter(ranks, -1);
    std::vector<size_t> position(ranks, 0);
    std::vector<int64_t> free_ns(ranks, 0);
    std::vector<int> runnable;
    StageTimes& times = result_.times;
    times.ranks.resize(ranks);
    for (int r = ranks - 1; r >= 0; --r) {
      times.ranks[r].resize(schedule_.ranks[r].size());
      runnable.push_back(r);
    }
    while (!runnable.empty()) {
      const int r = runnable.back();
      runnable.pop_back();
      const std::vector<ScheduledStage>& order = schedule_.ranks[r];
      while (position[r] < order.size()) {
        const ScheduledStage& s = order[position[r]];
        int64_t start_ns = free_ns[r];
        if (!InputsArrive(s, r, &start_ns)) {
          next_waiter[r] = first_waiter[blocked_on_];
          first_waiter[blocked_on_] = r;
          break;
        }
        const int64_t end_ns = start_ns + Duration(s);
        times.ranks[r][position[r]] = {start_ns, end_ns};
        times.makespan_ns = std::max(times.makespan_ns, end_ns);
        free_ns[r] = end_ns;
        const int task = Pair(s.sweep, s.stage) * kSlots + SlotOf(s.kind);
        end_[task] = end_ns;
        ++position[r];
        for (int waiter = first_waiter[task]; waiter >= 0;
             waiter = next_waiter[waiter]) {
          runnable.push_back(waiter);
        }
      }
    }
    std::vector<std::string> stuck;
    for (int r = 0; r < ranks; ++r) {
      if (position[r] < schedule_.ranks[r].size()) {
        stuck.push_back(absl::StrCat("rank ", r, " at ",
                                     Name(schedule_.ranks[r][position[r]])));
      }
    }
    if (!stuck.empty()) {
      if (stuck.size() > 4) stuck.resize(4);
      return Violation(absl::StrCat("the ranks wait for each other: ",
                                    absl::StrJoin(stuck, ", ")));
    }
    return absl::OkStatus();
  }

  const Problem& problem_;
  const Schedule& schedule_;
  std::vector<int> first_pair_;      // [sweep], and the number of pairs
  std::vector<int> first_consumer_;  // [sweep]: range in consumers_
  std::vector<int> consumers_;
  std::vector<int> choice_;       // [pair], -1 when absent
  std::vector<uint8_t> splits_;   // [pair]
  std::vector<uint8_t> fused_;    // [pair]: a B in place of I and W
  std::vector<uint8_t> present_;  // [pair * kSlots + slot]
  std::vector<int> whole_backward_;
  std::vector<int64_t> end_;  // [pair * kSlots + slot]
  int blocked_on_ = -1;
  CheckedSchedule result_;
};

}  // namespace

absl::StatusOr<CheckedSchedule> CheckSchedule(const Problem& problem,
                                              const Schedule& schedule) {
  return Checker(problem, schedule).Run();
}

absl::Status CheckPlan(const Problem& problem, const Schedule& schedule,
                       const StageTimes& claimed) {
  PW_ASSIGN_OR_RETURN(const CheckedSchedule checked,
                      CheckSchedule(problem, schedule));
  if (claimed.makespan_ns != checked.times.makespan_ns) {
    return absl::FailedPreconditionError(
        absl::StrCat("schedule: makespan_ns claimed ", claimed.makespan_ns,
                     ", is ", checked.times.makespan_ns));
  }
  if (claimed.ranks.size() != checked.times.ranks.size()) {
    return absl::FailedPreconditionError(absl::StrCat(
        "schedule: times of ", claimed.ranks.size(), " ranks claimed, of ",
        checked.times.ranks.size(), " expected"));
  }
  for (size_t r = 0; r < claimed.ranks.size(); ++r) {
    if (claimed.ranks[r].size() != checked.times.ranks[r].size()) {
      return absl::FailedPreconditionError(absl::StrCat(
          "schedule: rank ", r, ": ", claimed.ranks[r].size(),
          " times claimed for ", checked.times.ranks[r].size(), " stages"));
    }
    for (size_t i = 0; i < claimed.ranks[r].size(); ++i) {
      const StageTimes::Interval& claim = claimed.ranks[r][i];
      const StageTimes::Interval& is = checked.times.ranks[r][i];
      if (claim.start_ns != is.start_ns || claim.end_ns != is.end_ns) {
        return absl::FailedPreconditionError(absl::StrCat(
            "schedule: rank ", r, " position ", i, ": claimed to run from ",
            claim.start_ns, " to ", claim.end_ns, " ns, runs from ",
            is.start_ns, " to ", is.end_ns));
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace pipeweaver::search
