#include "search/lower/program_checker.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

constexpr int kAbsent = -1;

const char* KindName(ActionKind kind) {
  static constexpr const char* kNames[kNumActionKinds] = {
      "F",         "B",         "I",         "W",
      "POST_SEND", "POST_RECV", "WAIT_SEND", "WAIT_RECV",
      "OFFLOAD",   "RELOAD",    "WAIT_COPY", "GRADS_READY"};
  return kNames[static_cast<int>(kind)];
}

// What the problem says of a stage pair.
struct PairFacts {
  int rank = 0;
  int num_choices = 0;
  const Choice* choices = nullptr;
  bool splits = false;
};

// Bytes of a stage pair as its choice has them.
struct PairBytes {
  int64_t activation = 0;
  int64_t backward = 0;  // while its B or I runs
  int64_t weight_grad = 0;
  int64_t offload = kAbsent;  // kAbsent: nothing is offloaded
};

// Where the actions of a stage pair stand in its rank's program.
struct PairPlaces {
  int forward = kAbsent;
  int gradient = kAbsent;  // B or I
  int weight = kAbsent;    // W
  int choice = kAbsent;
  bool whole = false;  // the gradient is a B
};

// Where the actions of a transfer stand in the programs of its ranks.
class TransferPlaces {
 public:
  // REQUIRES: a post or a wait.
  int& Of(ActionKind kind) {
    return places_[static_cast<int>(kind) -
                   static_cast<int>(ActionKind::kPostSend)];
  }

 private:
  int places_[4] = {kAbsent, kAbsent, kAbsent, kAbsent};
};

// Host copies of a stage pair.
enum class CopyState : uint8_t { kNone, kGoingOut, kOut, kComingIn, kBack };

absl::Status Violation(absl::string_view what) {
  return absl::FailedPreconditionError(absl::StrCat("program: ", what));
}

int ModuleOf(const StepProblem& step, int sweep) {
  return step.sub_microbatches[step.sweeps[sweep].sub_microbatch].module;
}

class ProgramChecker {
 public:
  ProgramChecker(const StepProblem& step, const StepPrograms& programs,
                 const ProgramLimits& limits)
      : step_(step),
        problem_(step.problem),
        programs_(programs),
        limits_(limits),
        num_sweeps_(static_cast<int>(step.problem.sweeps.size())) {}

  absl::Status Run() {
    PW_RETURN_IF_ERROR(CheckShapes());
    PW_RETURN_IF_ERROR(CheckTransfers());
    PW_RETURN_IF_ERROR(FindPlaces());
    PW_RETURN_IF_ERROR(CheckStages());
    PW_RETURN_IF_ERROR(CheckDependencies());
    PW_RETURN_IF_ERROR(CheckPairing());
    PW_RETURN_IF_ERROR(CheckEnds());
    PW_RETURN_IF_ERROR(CheckAlongPrograms());
    return CheckGradsReady();
  }

 private:
  std::string Where(int rank, int position) const {
    const Action& a = programs_.ranks[rank][position];
    std::string where = absl::StrCat("rank ", rank, " action ", position, " (",
                                     KindName(a.kind));
    if (a.transfer >= 0 && a.transfer < NumTransfers()) {
      absl::StrAppend(&where, " of transfer ", a.transfer);
    }
    if (a.sweep >= 0 && a.sweep < NumSweeps()) {
      absl::StrAppend(&where, ", ", problem_.sweeps[a.sweep].id, " stage ",
                      a.stage);
    }
    return where + ")";
  }
  std::string StageName(int sweep, int stage) const {
    return absl::StrCat(problem_.sweeps[sweep].id, " stage ", stage);
  }

  int NumSweeps() const { return num_sweeps_; }
  int NumStages(int sweep) const {
    return first_pair_[sweep + 1] - first_pair_[sweep];
  }
  int NumTransfers() const {
    return static_cast<int>(programs_.transfers.size());
  }
  int RankOf(int sweep, int stage) const {
    return facts_[first_pair_[sweep] + stage].rank;
  }
  PairPlaces& Places(int sweep, int stage) {
    return places_[first_pair_[sweep] + stage];
  }

  absl::Status CheckShapes() {
    const size_t ranks = static_cast<size_t>(problem_.ranks);
    if (programs_.ranks.size() != ranks ||
        programs_.peak_bytes.size() != ranks ||
        limits_.memory_limit_bytes.size() != ranks) {
      return Violation(absl::StrCat(programs_.ranks.size(), " programs, ",
                                    programs_.peak_bytes.size(), " peaks, ",
                                    limits_.memory_limit_bytes.size(),
                                    " limits for ", ranks, " ranks"));
    }
    first_pair_.assign(NumSweeps() + 1, 0);
    first_after_.assign(NumSweeps() + 1, 0);
    for (int s = 0; s < NumSweeps(); ++s) {
      first_pair_[s + 1] =
          first_pair_[s] + static_cast<int>(problem_.sweeps[s].stages.size());
      first_after_[s + 1] =
          first_after_[s] + static_cast<int>(problem_.sweeps[s].after.size());
    }
    places_.assign(first_pair_.back(), {});
    facts_.reserve(first_pair_.back());
    const Choice* list = nullptr;  // the last looked at; stages share them
    bool list_splits = false;
    for (const Sweep& sweep : problem_.sweeps) {
      for (const Stage& stage : sweep.stages) {
        if (stage.choices.data() != list) {
          list = stage.choices.data();
          list_splits = problem_.split_backward;
          for (const Choice& c : stage.choices) {
            list_splits = list_splits && c.weight_grad_ns > 0;
          }
        }
        facts_.push_back({stage.rank, static_cast<int>(stage.choices.size()),
                          list, list_splits});
      }
    }
    return absl::OkStatus();
  }

  // The transfers are those that the problem's edges need, each once.
  absl::Status CheckTransfers() {
    const int stage_edges = first_pair_.back();
    std::vector<uint8_t> seen(2 * (stage_edges + first_after_.back()), 0);
    for (int t = 0; t < NumTransfers(); ++t) {
      const Transfer& x = programs_.transfers[t];
      const auto name = [t] { return absl::StrCat("transfer ", t); };
      for (const auto& [sweep, stage] :
           {std::make_pair(x.from_sweep, x.from_stage),
            std::make_pair(x.to_sweep, x.to_stage)}) {
        if (sweep < 0 || sweep >= NumSweeps() || stage < 0 ||
            stage >= NumStages(sweep)) {
          return Violation(absl::StrCat(name(), ": sweep ", sweep, " stage ",
                                        stage, " is no stage of the problem"));
        }
      }
      if (x.from_rank != RankOf(x.from_sweep, x.from_stage) ||
          x.to_rank != RankOf(x.to_sweep, x.to_stage) ||
          x.from_rank == x.to_rank) {
        return Violation(absl::StrCat(name(), ": from rank ", x.from_rank,
                                      " to ", x.to_rank,
                                      ", but its stages stand on ranks ",
                                      RankOf(x.from_sweep, x.from_stage),
                                      " and ", RankOf(x.to_sweep, x.to_stage)));
      }
      // The edge in forward direction.
      const int producer = x.gradient ? x.to_sweep : x.from_sweep;
      const int producer_stage = x.gradient ? x.to_stage : x.from_stage;
      const int consumer = x.gradient ? x.from_sweep : x.to_sweep;
      const int consumer_stage = x.gradient ? x.from_stage : x.to_stage;
      int edge = kAbsent;
      int64_t bytes = 0;
      if (producer == consumer) {
        if (consumer_stage == producer_stage + 1) {
          edge = first_pair_[producer] + producer_stage;
          bytes = step_.output_bytes[producer];
        }
      } else if (producer_stage == NumStages(producer) - 1 &&
                 consumer_stage == 0) {
        const auto& after = problem_.sweeps[consumer].after;
        const auto it = std::find(after.begin(), after.end(), producer);
        if (it != after.end()) {
          const int k = static_cast<int>(it - after.begin());
          edge = stage_edges + first_after_[consumer] + k;
          bytes = step_.after_bytes[consumer][k];
        }
      }
      if (edge == kAbsent ||
          (x.gradient && !problem_.sweeps[producer].backward)) {
        return Violation(
            absl::StrCat(name(), ": no ", x.gradient ? "gradient" : "value",
                         " goes from ", StageName(x.from_sweep, x.from_stage),
                         " to ", StageName(x.to_sweep, x.to_stage)));
      }
      const int64_t transfer_ns =
          problem_.sweeps[producer].stages[producer_stage].transfer_ns;
      if (x.bytes != bytes || x.duration_ns != transfer_ns) {
        return Violation(absl::StrCat(name(), ": ", x.bytes, " bytes in ",
                                      x.duration_ns, " ns, should be ", bytes,
                                      " in ", transfer_ns));
      }
      if (seen[2 * edge + x.gradient]) {
        return Violation(absl::StrCat(
            name(), ": the ", x.gradient ? "gradient" : "value", " from ",
            StageName(x.from_sweep, x.from_stage), " to ",
            StageName(x.to_sweep, x.to_stage), " crosses twice"));
      }
      seen[2 * edge + x.gradient] = 1;
    }
    const auto missing = [&](int edge, int producer, int producer_stage,
                             int consumer, int consumer_stage) {
      if (RankOf(producer, producer_stage) ==
          RankOf(consumer, consumer_stage)) {
        return absl::OkStatus();
      }
      for (int gradient = 0; gradient <= problem_.sweeps[producer].backward;
           ++gradient) {
        if (!seen[2 * edge + gradient]) {
          return Violation(absl::StrCat(
              "the ", gradient ? "gradient" : "value", " between ",
              StageName(producer, producer_stage), " and ",
              StageName(consumer, consumer_stage), " never crosses"));
        }
      }
      return absl::OkStatus();
    };
    for (int s = 0; s < NumSweeps(); ++s) {
      for (int k = 0; k + 1 < NumStages(s); ++k) {
        PW_RETURN_IF_ERROR(missing(first_pair_[s] + k, s, k, s, k + 1));
      }
      const auto& after = problem_.sweeps[s].after;
      for (size_t k = 0; k < after.size(); ++k) {
        PW_RETURN_IF_ERROR(
            missing(stage_edges + first_after_[s] + static_cast<int>(k),
                    after[k], NumStages(after[k]) - 1, s, 0));
      }
    }
    return absl::OkStatus();
  }

  // Finds every action's place; refuses what stands twice or nowhere it may.
  absl::Status FindPlaces() {
    transfer_places_.assign(NumTransfers(), {});
    for (int r = 0; r < problem_.ranks; ++r) {
      const std::vector<Action>& program = programs_.ranks[r];
      for (int i = 0; i < static_cast<int>(program.size()); ++i) {
        const Action& a = program[i];
        if (static_cast<int>(a.kind) >= kNumActionKinds) {
          return Violation(
              absl::StrCat("rank ", r, " action ", i, ": no such kind"));
        }
        const bool known_sweep = a.sweep >= 0 && a.sweep < NumSweeps();
        const int pair = known_sweep ? first_pair_[a.sweep] + a.stage : 0;
        if (!known_sweep || a.stage < 0 || pair >= first_pair_[a.sweep + 1]) {
          return Violation(absl::StrCat("rank ", r, " action ", i, ": sweep ",
                                        a.sweep, " stage ", a.stage,
                                        " is no stage of the problem"));
        }
        if (facts_[pair].rank != r) {
          return Violation(absl::StrCat(
              Where(r, i), ": its stage stands on rank ", facts_[pair].rank));
        }
        if (IsTransfer(a.kind)) {
          PW_RETURN_IF_ERROR(PlaceTransfer(r, i, a));
        } else {
          PW_RETURN_IF_ERROR(PlaceStage(r, i, a, pair));
        }
      }
    }
    return absl::OkStatus();
  }

  absl::Status PlaceTransfer(int r, int i, const Action& a) {
    if (a.transfer < 0 || a.transfer >= NumTransfers()) {
      return Violation(absl::StrCat(Where(r, i), ": transfer ", a.transfer,
                                    " of ", NumTransfers()));
    }
    const Transfer& x = programs_.transfers[a.transfer];
    const bool sends =
        a.kind == ActionKind::kPostSend || a.kind == ActionKind::kWaitSend;
    if (a.sweep != (sends ? x.from_sweep : x.to_sweep) ||
        a.stage != (sends ? x.from_stage : x.to_stage)) {
      return Violation(
          absl::StrCat(Where(r, i), ": the transfer's stage there is ",
                       sends ? StageName(x.from_sweep, x.from_stage)
                             : StageName(x.to_sweep, x.to_stage)));
    }
    int& place = transfer_places_[a.transfer].Of(a.kind);
    if (place != kAbsent) {
      return Violation(absl::StrCat(Where(r, i), " appears twice"));
    }
    place = i;
    return absl::OkStatus();
  }

  absl::Status PlaceStage(int r, int i, const Action& a, int pair) {
    const int num_choices = facts_[pair].num_choices;
    if (a.choice < 0 || a.choice >= num_choices) {
      return Violation(absl::StrCat(Where(r, i), ": choice ", a.choice, " of ",
                                    num_choices));
    }
    PairPlaces& places = places_[pair];
    if (places.choice != kAbsent && places.choice != a.choice) {
      return Violation(absl::StrCat(Where(r, i), ": choice ", a.choice,
                                    ", but ", places.choice,
                                    " elsewhere in its pair"));
    }
    places.choice = a.choice;
    if (a.kind == ActionKind::kGradsReady) grads_ready_.emplace_back(r, i);
    if (!IsCompute(a.kind)) return absl::OkStatus();
    int& place = a.kind == ActionKind::kForward      ? places.forward
                 : a.kind == ActionKind::kWeightGrad ? places.weight
                                                     : places.gradient;
    if (place != kAbsent) {
      return Violation(absl::StrCat(Where(r, i), " appears twice"));
    }
    place = i;
    if (a.kind == ActionKind::kBackward) places.whole = true;
    return absl::OkStatus();
  }

  absl::Status CheckStages() {
    for (int s = 0; s < NumSweeps(); ++s) {
      for (int k = 0; k < NumStages(s); ++k) {
        const PairPlaces& p = Places(s, k);
        const PairFacts& facts = facts_[first_pair_[s] + k];
        const bool splits = facts.splits;
        const auto wrong = [&](absl::string_view what) {
          return Violation(absl::StrCat(StageName(s, k), ": ", what));
        };
        if (p.forward == kAbsent) return wrong("F is missing");
        if (!problem_.sweeps[s].backward) {
          if (p.gradient != kAbsent || p.weight != kAbsent) {
            return wrong("has a backward, but its sweep runs forward only");
          }
          continue;
        }
        if (p.gradient == kAbsent) return wrong("its backward is missing");
        if (p.whole) {
          if (splits &&
              !facts.choices[p.choice].fused_backward_ns.has_value()) {
            return wrong("B, but its choice has no fused backward");
          }
          if (p.weight != kAbsent) return wrong("W beside its B");
        } else {
          if (!splits) return wrong("I, but its backward is not split");
          if (p.weight == kAbsent) return wrong("W is missing");
          if (p.weight < p.gradient) return wrong("W stands before its I");
        }
        if (p.gradient < p.forward) return wrong("backward before its F");
      }
    }
    return absl::OkStatus();
  }

  // Dependencies on one rank, by place; those across are the transfers' matter.
  absl::Status CheckDependencies() {
    const auto check = [&](int producer, int producer_stage, int consumer,
                           int consumer_stage) {
      if (RankOf(producer, producer_stage) !=
          RankOf(consumer, consumer_stage)) {
        return absl::OkStatus();
      }
      const PairPlaces& from = Places(producer, producer_stage);
      const PairPlaces& to = Places(consumer, consumer_stage);
      if (to.forward < from.forward) {
        return Violation(absl::StrCat(
            "F of ", StageName(consumer, consumer_stage),
            " stands before F of ", StageName(producer, producer_stage)));
      }
      if (problem_.sweeps[producer].backward && from.gradient < to.gradient) {
        return Violation(absl::StrCat(
            "the backward of ", StageName(producer, producer_stage),
            " stands before that of ", StageName(consumer, consumer_stage)));
      }
      return absl::OkStatus();
    };
    for (int s = 0; s < NumSweeps(); ++s) {
      for (int k = 0; k + 1 < NumStages(s); ++k) {
        PW_RETURN_IF_ERROR(check(s, k, s, k + 1));
      }
      for (int producer : problem_.sweeps[s].after) {
        PW_RETURN_IF_ERROR(check(producer, NumStages(producer) - 1, s, 0));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckPairing() {
    for (int t = 0; t < NumTransfers(); ++t) {
      TransferPlaces& places = transfer_places_[t];
      const int post_send = places.Of(ActionKind::kPostSend);
      const int post_recv = places.Of(ActionKind::kPostRecv);
      const int wait_send = places.Of(ActionKind::kWaitSend);
      const int wait_recv = places.Of(ActionKind::kWaitRecv);
      const Transfer& x = programs_.transfers[t];
      const auto wrong = [&](absl::string_view what) {
        return Violation(absl::StrCat(
            "transfer ", t, " from ", StageName(x.from_sweep, x.from_stage),
            " to ", StageName(x.to_sweep, x.to_stage), ": ", what));
      };
      if (post_send == kAbsent) return wrong("POST_SEND is missing");
      if (post_recv == kAbsent) return wrong("POST_RECV is missing");
      if (wait_send == kAbsent) return wrong("WAIT_SEND is missing");
      if (wait_recv == kAbsent) return wrong("WAIT_RECV is missing");
      if (wait_send < post_send) {
        return wrong("WAIT_SEND stands before POST_SEND");
      }
      if (wait_recv < post_recv) {
        return wrong("WAIT_RECV stands before POST_RECV");
      }
      const PairPlaces& from = Places(x.from_sweep, x.from_stage);
      const PairPlaces& to = Places(x.to_sweep, x.to_stage);
      if (post_send < (x.gradient ? from.gradient : from.forward)) {
        return wrong("POST_SEND stands before the value is made");
      }
      if (wait_recv > (x.gradient ? to.gradient : to.forward)) {
        return wrong("WAIT_RECV stands behind its consumer");
      }
    }
    return absl::OkStatus();
  }

  // REQUIRES: CheckStages has passed.
  std::vector<PairBytes> BytesOfPairs() const {
    std::vector<PairBytes> bytes;
    bytes.reserve(places_.size());
    for (int s = 0; s < NumSweeps(); ++s) {
      const auto& segment =
          step_.choices[ModuleOf(step_, s)][step_.sweeps[s].segment];
      for (int k = 0; k < NumStages(s); ++k) {
        const PairFacts& facts = facts_[bytes.size()];
        const PairPlaces& places = places_[bytes.size()];
        const Choice& c = facts.choices[places.choice];
        const MemoryChoice& memory = segment[k][places.choice];
        const bool fused = places.whole && facts.splits;
        const bool offloads =
            problem_.sweeps[s].backward && memory.offload_layers > 0;
        bytes.push_back({c.activation_bytes,
                         fused ? c.fused_backward_bytes : c.backward_bytes,
                         c.weight_grad_bytes,
                         offloads ? memory.offload_bytes : kAbsent});
      }
    }
    return bytes;
  }

  // What follows from each program's order: the order of its posts, receives
  // ahead, host copies and memory.
  absl::Status CheckAlongPrograms() {
    std::vector<CopyState> copies(places_.size(), CopyState::kNone);
    const std::vector<PairBytes> bytes_of = BytesOfPairs();
    // Receive buffers that a value's consumer takes over, by pair and
    // direction.
    std::vector<int64_t> received(2 * places_.size(), 0);
    for (int r = 0; r < problem_.ranks; ++r) {
      int64_t live = 0;
      int64_t peak = 0;
      int last_posted = kAbsent;
      int ahead = 0;
      const std::vector<Action>& program = programs_.ranks[r];
      const int actions = static_cast<int>(program.size());
      for (int i = 0; i < actions; ++i) {
        const Action& a = program[i];
        const int pair = first_pair_[a.sweep] + a.stage;
        const PairBytes& bytes = bytes_of[pair];
        const bool offloads = bytes.offload != kAbsent;
        CopyState& copy = copies[pair];
        const auto misplaced = [&] {
          return Violation(absl::StrCat(
              Where(r, i), offloads ? ": host copies out of order"
                                    : ": its choice does not offload"));
        };
        switch (a.kind) {
          case ActionKind::kForward:
            live += bytes.activation - received[2 * pair];
            if (offloads) live += bytes.offload;
            peak = std::max(peak, live);
            if (!problem_.sweeps[a.sweep].backward) live -= bytes.activation;
            break;
          case ActionKind::kBackward:
          case ActionKind::kInputGrad:
            if (offloads) {
              if (copy != CopyState::kBack) return misplaced();
              live -= bytes.offload;
              copy = CopyState::kNone;
            }
            live -= bytes.activation + received[2 * pair + 1];
            peak = std::max(peak, live + bytes.backward);
            if (a.kind == ActionKind::kInputGrad) {
              live += bytes.weight_grad;
              peak = std::max(peak, live);
            }
            break;
          case ActionKind::kWeightGrad:
            peak = std::max(peak, live);
            live -= bytes.weight_grad;
            break;
          case ActionKind::kPostSend:
          case ActionKind::kPostRecv: {
            if (a.transfer < last_posted) {
              return Violation(
                  absl::StrCat(Where(r, i), " is posted behind transfer ",
                               last_posted, ", against the global order"));
            }
            last_posted = a.transfer;
            const Transfer& x = programs_.transfers[a.transfer];
            live += x.bytes;
            peak = std::max(peak, live);
            if (a.kind == ActionKind::kPostSend) break;
            received[2 * pair + x.gradient] += x.bytes;
            if (++ahead > limits_.max_receives_ahead) {
              return Violation(absl::StrCat(Where(r, i), ": ", ahead,
                                            " receives ahead, over the limit ",
                                            "of ", limits_.max_receives_ahead));
            }
            break;
          }
          case ActionKind::kWaitSend:
            live -= programs_.transfers[a.transfer].bytes;
            break;
          case ActionKind::kWaitRecv:
            --ahead;
            break;
          case ActionKind::kOffload:
            if (!offloads || copy != CopyState::kNone ||
                i < places_[pair].forward) {
              return misplaced();
            }
            copy = CopyState::kGoingOut;
            break;
          case ActionKind::kReload:
            if (!offloads || copy != CopyState::kOut) return misplaced();
            copy = CopyState::kComingIn;
            live += bytes.offload;
            peak = std::max(peak, live);
            break;
          case ActionKind::kWaitCopy:
            if (copy == CopyState::kGoingOut) {
              copy = CopyState::kOut;
              live -= bytes.offload;
            } else if (copy == CopyState::kComingIn) {
              copy = CopyState::kBack;
            } else {
              return misplaced();
            }
            break;
          case ActionKind::kGradsReady:
            break;
        }
        if (peak > limits_.memory_limit_bytes[r]) {
          return Violation(absl::StrCat(Where(r, i), ": ", peak,
                                        " bytes live, over the limit of ",
                                        limits_.memory_limit_bytes[r]));
        }
      }
      if (peak != programs_.peak_bytes[r]) {
        return Violation(absl::StrCat("rank ", r, ": peak claimed ",
                                      programs_.peak_bytes[r], " bytes, is ",
                                      peak));
      }
    }
    for (size_t pair = 0; pair < copies.size(); ++pair) {
      if (copies[pair] != CopyState::kNone) {
        return Violation(
            absl::StrCat("stage pair ", pair, ": a host copy is left over"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status CheckGradsReady() {
    // [module][segment][chunk]: place of the last backward.
    struct Chunk {
      int last = kAbsent;
      bool ready = false;
    };
    std::vector<std::vector<std::vector<Chunk>>> chunks(step_.choices.size());
    for (size_t m = 0; m < step_.choices.size(); ++m) {
      for (const auto& segment : step_.choices[m]) {
        chunks[m].emplace_back(segment.size());
      }
    }
    for (int s = 0; s < NumSweeps(); ++s) {
      if (!problem_.sweeps[s].backward) continue;
      std::vector<Chunk>& segment =
          chunks[ModuleOf(step_, s)][step_.sweeps[s].segment];
      for (int k = 0; k < NumStages(s); ++k) {
        Chunk& chunk = segment[k];
        const PairPlaces& p = Places(s, k);
        chunk.last = std::max({chunk.last, p.gradient, p.weight});
      }
    }
    for (const auto& [r, i] : grads_ready_) {
      const Action& a = programs_.ranks[r][i];
      Chunk& chunk = chunks[ModuleOf(step_, a.sweep)]
                           [step_.sweeps[a.sweep].segment][a.stage];
      if (chunk.last == kAbsent) {
        return Violation(
            absl::StrCat(Where(r, i), ": its chunk has no backward"));
      }
      if (chunk.ready) {
        return Violation(
            absl::StrCat(Where(r, i), ": its chunk is ready twice"));
      }
      if (i < chunk.last) {
        return Violation(absl::StrCat(Where(r, i), " stands before ",
                                      Where(r, chunk.last),
                                      ", a backward of its chunk"));
      }
      chunk.ready = true;
    }
    for (size_t m = 0; m < chunks.size(); ++m) {
      for (size_t k = 0; k < chunks[m].size(); ++k) {
        for (size_t c = 0; c < chunks[m][k].size(); ++c) {
          if (chunks[m][k][c].last != kAbsent && !chunks[m][k][c].ready) {
            return Violation(absl::StrCat("module ", m, " segment ", k,
                                          " chunk ", c,
                                          ": GRADS_READY is missing"));
          }
        }
      }
    }
    return absl::OkStatus();
  }

  // Removes from the event graph what has no predecessors left until nothing is
  // left, or a cycle. Events: actions, in each rank's order; the end of each
  // transfer, behind its two posts and the end of the transfer before it on the
  // channel of its two ranks; waits stand behind the end of their transfer.
  // With buffered sends the graph has a part of these edges only (a receive
  // ends behind its two posts, a send by itself), so it has no cycle either.
  absl::Status CheckEnds() {
    const int ranks = problem_.ranks;
    const int transfers = NumTransfers();
    // Per pair of ranks, the first of its transfers that has not ended;
    // `transfers` where all have.
    std::vector<int> first_left(static_cast<size_t>(ranks) * ranks, transfers);
    std::vector<size_t> channel_of(transfers);
    std::vector<int> next_on_channel(transfers);
    for (int t = transfers; t-- > 0;) {
      const Transfer& x = programs_.transfers[t];
      channel_of[t] =
          static_cast<size_t>(std::min(x.from_rank, x.to_rank)) * ranks +
          std::max(x.from_rank, x.to_rank);
      next_on_channel[t] = std::exchange(first_left[channel_of[t]], t);
    }
    std::vector<uint8_t> posts_missing(transfers, 2);
    std::vector<size_t> position(ranks, 0);
    std::vector<uint8_t> listed(ranks, 1);
    std::vector<int> runnable;
    for (int r = ranks - 1; r >= 0; --r) runnable.push_back(r);
    while (!runnable.empty()) {
      const int r = runnable.back();
      runnable.pop_back();
      listed[r] = 0;
      const std::vector<Action>& program = programs_.ranks[r];
      size_t i = position[r];
      for (; i < program.size(); ++i) {
        const Action& a = program[i];
        if (!IsTransfer(a.kind)) continue;
        int& left = first_left[channel_of[a.transfer]];
        if (a.kind == ActionKind::kWaitSend ||
            a.kind == ActionKind::kWaitRecv) {
          if (left <= a.transfer) break;
          continue;
        }
        --posts_missing[a.transfer];
        for (; left < transfers && posts_missing[left] == 0;
             left = next_on_channel[left]) {
          const Transfer& x = programs_.transfers[left];
          for (int end : {x.from_rank, x.to_rank}) {
            if (end == r || listed[end]) continue;
            listed[end] = 1;
            runnable.push_back(end);
          }
        }
      }
      position[r] = i;
    }
    std::vector<std::string> stuck;
    for (int r = 0; r < ranks; ++r) {
      if (position[r] < programs_.ranks[r].size()) {
        stuck.push_back(Where(r, static_cast<int>(position[r])));
      }
    }
    if (stuck.empty()) return absl::OkStatus();
    if (stuck.size() > 4) stuck.resize(4);
    return Violation(absl::StrCat("the ranks wait for each other: ",
                                  absl::StrJoin(stuck, ", ")));
  }

  const StepProblem& step_;
  const Problem& problem_;
  const StepPrograms& programs_;
  const ProgramLimits& limits_;
  const int num_sweeps_;

  std::vector<int> first_pair_;     // [sweep], and the number of pairs
  std::vector<int> first_after_;    // [sweep], and the number of after edges
  std::vector<PairFacts> facts_;    // [pair]
  std::vector<PairPlaces> places_;  // [pair]
  std::vector<std::pair<int, int>> grads_ready_;  // rank and place of each
  std::vector<TransferPlaces> transfer_places_;   // [transfer]
};

}  // namespace

absl::Status CheckSplit(const StepProblem& step) {
  const int num_sweeps = static_cast<int>(step.problem.sweeps.size());
  if (static_cast<int>(step.sweeps.size()) != num_sweeps) {
    return Violation(absl::StrCat(step.sweeps.size(), " origins for ",
                                  num_sweeps, " sweeps"));
  }
  std::vector<std::tuple<int, int, int>> items;  // microbatch, module, item
  for (const SubMicrobatch& sub : step.sub_microbatches) {
    if (sub.items.empty()) {
      return Violation(absl::StrCat("a sub-microbatch of microbatch ",
                                    sub.microbatch, ", module ", sub.module,
                                    " has no items"));
    }
    for (int item : sub.items) {
      items.emplace_back(sub.microbatch, sub.module, item);
    }
  }
  if (!std::is_sorted(items.begin(), items.end())) {
    std::sort(items.begin(), items.end());
  }
  for (size_t i = 0; i < items.size(); ++i) {
    const auto& [microbatch, module, item] = items[i];
    const bool first = i == 0 || std::get<0>(items[i - 1]) != microbatch ||
                       std::get<1>(items[i - 1]) != module;
    const int expected = first ? 0 : std::get<2>(items[i - 1]) + 1;
    if (item != expected) {
      return Violation(absl::StrCat("microbatch ", microbatch, ", module ",
                                    module, ": item ", std::min(item, expected),
                                    item < expected
                                        ? " is in two sub-microbatches"
                                        : " is in no sub-microbatch"));
    }
  }
  for (const auto& [microbatch, module] : step.empty) {
    if (std::binary_search(items.begin(), items.end(),
                           std::make_tuple(microbatch, module, 0))) {
      return Violation(absl::StrCat("microbatch ", microbatch, ", module ",
                                    module,
                                    " is listed as empty, but has "
                                    "items"));
    }
  }
  std::vector<uint64_t> segments(step.sub_microbatches.size(), 0);
  for (int s = 0; s < num_sweeps; ++s) {
    const SweepOrigin& origin = step.sweeps[s];
    const int num_segments =
        static_cast<int>(step.choices[ModuleOf(step, s)].size());
    if (origin.segment < 0 || origin.segment >= num_segments ||
        origin.segment >= 64) {
      return Violation(absl::StrCat(step.problem.sweeps[s].id, ": segment ",
                                    origin.segment, " of ", num_segments));
    }
    const uint64_t bit = uint64_t{1} << origin.segment;
    if ((segments[origin.sub_microbatch] & bit) != 0) {
      return Violation(absl::StrCat(step.problem.sweeps[s].id,
                                    ": its sub-microbatch runs segment ",
                                    origin.segment, " twice"));
    }
    segments[origin.sub_microbatch] |= bit;
  }
  for (size_t i = 0; i < segments.size(); ++i) {
    const size_t expected =
        step.choices[step.sub_microbatches[i].module].size();
    for (size_t k = 0; k < expected; ++k) {
      if ((segments[i] >> k & 1) == 0) {
        return Violation(
            absl::StrCat("sub-microbatch ", i, " does not run segment ", k));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status CheckActions(const StepProblem& step, const StepPrograms& programs,
                          const ProgramLimits& limits) {
  return ProgramChecker(step, programs, limits).Run();
}

absl::Status CheckPrograms(const StepProblem& step,
                           const StepPrograms& programs,
                           const ProgramLimits& limits) {
  PW_RETURN_IF_ERROR(CheckSplit(step));
  return CheckActions(step, programs, limits);
}

}  // namespace pipeweaver::search
