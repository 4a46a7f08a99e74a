#include "search/lower/lower.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// A transfer on its way through the lowering.
struct TransferState {
  int64_t arrival_ns = 0;  // predicted
  bool receive_posted = false;
  bool receive_waited = false;
  int next_input = -1;  // the consumer's next transfer; a list by consumer
};

// A host copy under way: a stage pair's activations, outbound.
struct CopyOut {
  ScheduledStage stage;
  int64_t bytes = 0;
  bool overlapped = false;  // a stage has run since
};

struct RankState {
  int number = 0;
  int64_t limit_bytes = 0;
  int64_t peak_bytes = 0;
  std::vector<Action> program;
  size_t position = 0;             // in the schedule's order
  int64_t now_ns = 0;              // predicted end of the program so far
  int64_t previous_start_ns = -1;  // of the last stage
  int64_t held_bytes = 0;          // by stage pairs
  int64_t buffer_bytes = 0;        // by transfers and copies
  std::vector<int> owed;           // receives to be posted, ascending
  size_t first_owed = 0;           // those before are posted
  std::vector<int> receiving;      // posted, not waited for
  std::vector<int> sending;        // posted, not waited for
  std::vector<CopyOut> copies_out;
  bool reloaded = false;  // RELOAD of the next backward is in the program
};

class Lowering {
 public:
  // `ahead`: posts receives and issues reloads before they must be.
  Lowering(const StepProblem& step, const ProblemGraph& graph,
           const Schedule& schedule, const StageTimes& times,
           const ProgramLimits& limits, bool ahead)
      : step_(step),
        graph_(graph),
        schedule_(schedule),
        times_(times),
        limits_(limits),
        ahead_(ahead),
        offloads_(MostOffloadBytes(step).has_value()) {}

  absl::StatusOr<StepPrograms> Run() {
    Index();
    PW_RETURN_IF_ERROR(AppendAll());
    for (RankState& rank : ranks_) {
      for (const CopyOut& copy : rank.copies_out) WaitCopyOut(rank, copy);
      for (int t : rank.sending) AppendTransfer(rank, ActionKind::kWaitSend, t);
      programs_.ranks.push_back(std::move(rank.program));
      programs_.peak_bytes.push_back(rank.peak_bytes);
    }
    programs_.makespan_ns = times_.makespan_ns;
    return std::move(programs_);
  }

 private:
  int PairOf(const ScheduledStage& s) const {
    return graph_.sweep_first_pair[s.sweep] + s.stage;
  }
  const GraphChoice& ChoiceOf(const ScheduledStage& s) const {
    return graph_.choices_of(PairOf(s))[s.choice];
  }
  // The values a stage pair makes: of its F, and of its B or I.
  static int Value(int pair, bool gradient) {
    return 2 * pair + (gradient ? 1 : 0);
  }
  static bool MakesGradient(const ScheduledStage& s) {
    return s.kind == StageKind::kBackward || s.kind == StageKind::kInputGrad;
  }
  static bool CompletesWeights(const ScheduledStage& s) {
    return s.kind == StageKind::kBackward || s.kind == StageKind::kWeightGrad;
  }
  // -1: nothing of `s` is offloaded.
  int64_t OffloadBytes(const ScheduledStage& s) const {
    if (!offloads_) return -1;
    const SweepOrigin& origin = step_.sweeps[s.sweep];
    const int module = step_.sub_microbatches[origin.sub_microbatch].module;
    const MemoryChoice& choice =
        step_.choices[module][origin.segment][s.stage][s.choice];
    return choice.offload_layers > 0 && graph_.has_backward(PairOf(s))
               ? choice.offload_bytes
               : -1;
  }

  void Index() {
    const std::vector<Sweep>& sweeps = step_.problem.sweeps;
    int chunks = 0;
    std::vector<std::vector<int>> first_chunk;  // [module][segment]
    for (const auto& module : step_.choices) {
      auto& first = first_chunk.emplace_back();
      for (const auto& segment : module) {
        first.push_back(chunks);
        chunks += static_cast<int>(segment.size());
      }
    }
    backwards_left_.assign(chunks, 0);
    first_chunk_.reserve(sweeps.size());
    place_in_after_.resize(graph_.consumers.size());
    std::vector<int> consumers_found(sweeps.size(), 0);
    for (size_t s = 0; s < sweeps.size(); ++s) {
      const auto& after = sweeps[s].after;
      for (size_t k = 0; k < after.size(); ++k) {
        const int last = graph_.sweep_first_pair[after[k] + 1] - 1;
        place_in_after_[graph_.consumer_begin[last] +
                        consumers_found[after[k]]++] = static_cast<int>(k);
      }
      const SweepOrigin& origin = step_.sweeps[s];
      const int module = step_.sub_microbatches[origin.sub_microbatch].module;
      first_chunk_.push_back(first_chunk[module][origin.segment]);
      if (!sweeps[s].backward) continue;
      for (size_t k = 0; k < sweeps[s].stages.size(); ++k) {
        ++backwards_left_[first_chunk_[s] + static_cast<int>(k)];
      }
    }
    const int values = 2 * graph_.pairs;
    done_.assign(values, false);
    first_input_.assign(values, -1);
    last_input_.assign(values, -1);
    first_waiter_.assign(values, -1);
    next_waiter_.assign(graph_.ranks, -1);
    ranks_.resize(graph_.ranks);
    for (int r = 0; r < graph_.ranks; ++r) {
      RankState& rank = ranks_[r];
      rank.number = r;
      rank.limit_bytes = limits_.memory_limit_bytes[r];
      rank.program.reserve(schedule_.ranks[r].size() * 5);
    }
    // Each edge is a transfer and one back at most.
    programs_.transfers.reserve(2 * graph_.producers.size());
    transfers_.reserve(2 * graph_.producers.size());
  }

  // Takes the stages in the topological order: of the ranks' next stages the
  // one predicted to end first.
  absl::Status AppendAll() {
    // [rank]: end of its next stage, kNever where it has none or waits.
    std::vector<int64_t> next_end_ns(graph_.ranks);
    const auto find_next = [&](int r) {
      const size_t position = ranks_[r].position;
      next_end_ns[r] = position < schedule_.ranks[r].size()
                           ? times_.ranks[r][position].end_ns
                           : kNever;
    };
    for (int r = 0; r < graph_.ranks; ++r) find_next(r);
    while (true) {
      const auto first =
          std::min_element(next_end_ns.begin(), next_end_ns.end());
      if (first == next_end_ns.end() || *first == kNever) break;
      const int r = static_cast<int>(first - next_end_ns.begin());
      const ScheduledStage& s = schedule_.ranks[r][ranks_[r].position];
      const int missing = MissingInput(s);
      if (missing >= 0) {
        next_end_ns[r] = kNever;
        next_waiter_[r] = first_waiter_[missing];
        first_waiter_[missing] = r;
        continue;
      }
      PW_RETURN_IF_ERROR(AppendStage(ranks_[r], s));
      ++ranks_[r].position;
      find_next(r);
      if (s.kind == StageKind::kWeightGrad) continue;
      const int value = Value(PairOf(s), MakesGradient(s));
      done_[value] = true;
      for (int w = first_waiter_[value]; w >= 0; w = next_waiter_[w]) {
        find_next(w);
      }
    }
    for (int r = 0; r < graph_.ranks; ++r) {
      if (ranks_[r].position < schedule_.ranks[r].size()) {
        return absl::FailedPreconditionError(
            absl::StrCat("lowering: the ranks wait for each other, rank ", r,
                         " at position ", ranks_[r].position, " of its order"));
      }
    }
    return absl::OkStatus();
  }

  // An input of `s` that is not made yet, or -1.
  int MissingInput(const ScheduledStage& s) const {
    const int pair = PairOf(s);
    if (s.kind == StageKind::kForward) {
      for (const GraphEdge& edge : graph_.producers_of(pair)) {
        const int value = Value(edge.pair, false);
        if (!done_[value]) return value;
      }
      return -1;
    }
    if (s.kind == StageKind::kWeightGrad) {
      const int value = Value(pair, true);
      return done_[value] ? -1 : value;
    }
    if (const int value = Value(pair, false); !done_[value]) return value;
    for (const GraphEdge& edge : graph_.consumers_of(pair)) {
      const int value = Value(edge.pair, true);
      if (graph_.has_backward(edge.pair) && !done_[value]) return value;
    }
    return -1;
  }

  absl::Status AppendStage(RankState& rank, const ScheduledStage& s) {
    const StageTimes::Interval& interval =
        times_.ranks[rank.number][rank.position];
    const int64_t growth = Growth(s);
    const bool consumes = s.kind != StageKind::kWeightGrad;
    const int inputs =
        consumes ? first_input_[Value(PairOf(s), MakesGradient(s))] : -1;

    WaitForOldSends(rank);
    for (CopyOut& copy : rank.copies_out) {
      if (copy.overlapped) WaitCopyOut(rank, copy);
    }
    std::erase_if(rank.copies_out,
                  [](const CopyOut& copy) { return copy.overlapped; });

    // Receives: all that s consumes, and further ones as limits allow.
    int last_needed = -1;
    int64_t input_bytes = 0;
    for (int t = inputs; t >= 0; t = transfers_[t].next_input) {
      last_needed = std::max(last_needed, t);
      input_bytes += programs_.transfers[t].bytes;
    }
    const int64_t offload_bytes = MakesGradient(s) ? OffloadBytes(s) : -1;
    const int64_t taken_over =
        input_bytes + (rank.reloaded ? std::max<int64_t>(offload_bytes, 0) : 0);
    while (rank.first_owed < rank.owed.size()) {
      const int t = rank.owed[rank.first_owed];
      const bool needed = t <= last_needed;
      if (!needed &&
          (!ahead_ || !HasReceiveSlot(rank, interval.start_ns) ||
           !Fits(rank, programs_.transfers[t].bytes) ||
           !Fits(rank, programs_.transfers[t].bytes - taken_over + growth))) {
        break;
      }
      PW_RETURN_IF_ERROR(PostReceive(rank, s));
    }
    for (int t = inputs; t >= 0; t = transfers_[t].next_input) {
      if (!transfers_[t].receive_waited) WaitReceive(rank, t);
    }

    if (offload_bytes >= 0) {
      if (!rank.reloaded) {
        MakeRoom(rank, offload_bytes);
        PW_RETURN_IF_ERROR(Reload(rank, s, offload_bytes, s));
      }
      Append(rank, ActionKind::kWaitCopy, s);
      rank.reloaded = false;
    }
    // What s takes over when it starts, and what it needs then.
    const int64_t buffered = input_bytes + std::max<int64_t>(offload_bytes, 0);
    MakeRoom(rank, growth - buffered);
    PW_RETURN_IF_ERROR(MaybeReloadAhead(rank, s, growth - buffered));
    rank.buffer_bytes -= buffered;

    rank.now_ns = interval.end_ns;
    Append(rank, static_cast<ActionKind>(s.kind), s).start_ns =
        interval.start_ns;
    rank.previous_start_ns = interval.start_ns;
    for (CopyOut& copy : rank.copies_out) copy.overlapped = true;
    PW_RETURN_IF_ERROR(Note(rank, growth, s));
    rank.held_bytes += Kept(s);

    if (s.kind == StageKind::kForward) {
      if (const int64_t bytes = OffloadBytes(s); bytes >= 0) {
        Append(rank, ActionKind::kOffload, s);
        rank.copies_out.push_back({s, bytes, false});
        rank.buffer_bytes += bytes;
      }
    }
    PW_RETURN_IF_ERROR(Send(rank, s));
    if (CompletesWeights(s) &&
        --backwards_left_[first_chunk_[s.sweep] + s.stage] == 0) {
      Append(rank, ActionKind::kGradsReady, s);
    }
    return absl::OkStatus();
  }

  // Appends the sends of what `s` made.
  absl::Status Send(RankState& rank, const ScheduledStage& s) {
    if (s.kind == StageKind::kWeightGrad) return absl::OkStatus();
    const int pair = PairOf(s);
    const bool gradient = MakesGradient(s);
    const ArrayView<GraphEdge> edges =
        gradient ? graph_.producers_of(pair) : graph_.consumers_of(pair);
    const auto crosses = [&](const GraphEdge& edge) {
      return graph_.pair_rank[edge.pair] != rank.number &&
             (!gradient || graph_.has_backward(edge.pair));
    };
    if (std::none_of(edges.begin(), edges.end(), crosses)) {
      return absl::OkStatus();
    }
    while (rank.first_owed < rank.owed.size()) {
      PW_RETURN_IF_ERROR(PostReceive(rank, s));
    }
    for (const GraphEdge& edge : edges) {
      if (!crosses(edge)) continue;
      const int t = AddTransfer(s, pair, gradient, edge);
      const Transfer& transfer = programs_.transfers[t];
      transfers_.emplace_back().arrival_ns = rank.now_ns + transfer.duration_ns;
      const int input = Value(edge.pair, gradient);
      if (last_input_[input] >= 0) {
        transfers_[last_input_[input]].next_input = t;
      } else {
        first_input_[input] = t;
      }
      last_input_[input] = t;
      MakeRoom(rank, transfer.bytes);
      AppendTransfer(rank, ActionKind::kPostSend, t);
      rank.buffer_bytes += transfer.bytes;
      PW_RETURN_IF_ERROR(Note(rank, 0, s));
      rank.sending.push_back(t);
      ranks_[transfer.to_rank].owed.push_back(t);
    }
    return absl::OkStatus();
  }

  // The transfer along `edge` of what `s`, a stage of `pair`, made; its number.
  int AddTransfer(const ScheduledStage& s, int pair, bool gradient,
                  const GraphEdge& edge) {
    Transfer& x = programs_.transfers.emplace_back();
    x.from_rank = graph_.pair_rank[pair];
    x.to_rank = graph_.pair_rank[edge.pair];
    x.from_sweep = s.sweep;
    x.from_stage = s.stage;
    x.to_sweep = graph_.pair_sweep[edge.pair];
    x.to_stage = graph_.stage_index(edge.pair);
    x.gradient = gradient;
    x.duration_ns = edge.delay_ns;
    if (x.to_sweep == s.sweep) {
      x.bytes = step_.output_bytes[s.sweep];
    } else if (gradient) {
      const GraphEdge* first = graph_.producers_of(pair).begin();
      x.bytes = step_.after_bytes[s.sweep][&edge - first];
    } else {
      const GraphEdge* first = graph_.consumers.data();
      x.bytes = step_.after_bytes[x.to_sweep][place_in_after_[&edge - first]];
    }
    return static_cast<int>(programs_.transfers.size()) - 1;
  }

  // Bytes that `s` needs while it runs or right after, beyond those held
  // before.
  int64_t Growth(const ScheduledStage& s) const {
    const GraphChoice& c = ChoiceOf(s);
    switch (s.kind) {
      case StageKind::kForward:
        return c.activation_bytes + std::max<int64_t>(OffloadBytes(s), 0);
      case StageKind::kBackward:
        return c.backward_bytes - c.activation_bytes;
      case StageKind::kInputGrad:
        return std::max(c.input_grad_bytes, c.weight_grad_bytes) -
               c.activation_bytes;
      case StageKind::kWeightGrad:
        return 0;
    }
    return 0;
  }

  // Bytes that stay held behind `s`, less those held before.
  int64_t Kept(const ScheduledStage& s) const {
    const GraphChoice& c = ChoiceOf(s);
    switch (s.kind) {
      case StageKind::kForward:
        return graph_.has_backward(PairOf(s)) ? c.activation_bytes : 0;
      case StageKind::kBackward:
        return -c.activation_bytes;
      case StageKind::kInputGrad:
        return c.weight_grad_bytes - c.activation_bytes;
      case StageKind::kWeightGrad:
        return -c.weight_grad_bytes;
    }
    return 0;
  }

  static bool Fits(const RankState& rank, int64_t more_bytes) {
    return rank.held_bytes + rank.buffer_bytes + more_bytes <= rank.limit_bytes;
  }

  // Records what is live with `more_bytes`; an error when that is too much.
  absl::Status Note(RankState& rank, int64_t more_bytes,
                    const ScheduledStage& at) const {
    const int64_t live = rank.held_bytes + rank.buffer_bytes + more_bytes;
    rank.peak_bytes = std::max(rank.peak_bytes, live);
    return live <= rank.limit_bytes ? absl::OkStatus()
                                    : TooMuch(rank, live, at);
  }

  absl::Status TooMuch(const RankState& rank, int64_t live_bytes,
                       const ScheduledStage& at) const {
    return absl::ResourceExhaustedError(absl::StrCat(
        "rank ", rank.number, ": activations and transfers take ", live_bytes,
        " bytes at ", std::string(1, StageKindLetter(at.kind)), " of ",
        step_.problem.sweeps[at.sweep].id, " stage ", at.stage,
        ", over the limit of ", rank.limit_bytes));
  }

  // Waits for copies and sends of the rank until `more_bytes` fit, or nothing
  // is left that could be waited for.
  void MakeRoom(RankState& rank, int64_t more_bytes) {
    if (!Fits(rank, more_bytes)) WaitForRoom(rank, more_bytes);
  }

  void WaitForRoom(RankState& rank, int64_t more_bytes) {
    while (!Fits(rank, more_bytes) && !rank.copies_out.empty()) {
      WaitCopyOut(rank, rank.copies_out.front());
      rank.copies_out.erase(rank.copies_out.begin());
    }
    for (size_t i = 0; i < rank.sending.size() && !Fits(rank, more_bytes);) {
      const int t = rank.sending[i];
      RankState& peer = ranks_[programs_.transfers[t].to_rank];
      // The receiver may post what it owes up to t, if it has the room.
      while (!transfers_[t].receive_posted && PostReceiveIfRoom(peer)) {
      }
      if (transfers_[t].receive_posted) {
        WaitSend(rank, i);
      } else {
        ++i;
      }
    }
  }

  void WaitForOldSends(RankState& rank) {
    for (size_t i = 0; i < rank.sending.size();) {
      const TransferState& t = transfers_[rank.sending[i]];
      if (t.receive_posted && t.arrival_ns <= rank.previous_start_ns) {
        WaitSend(rank, i);
      } else {
        ++i;
      }
    }
  }

  void WaitSend(RankState& rank, size_t index) {
    const int t = rank.sending[index];
    AppendTransfer(rank, ActionKind::kWaitSend, t);
    rank.buffer_bytes -= programs_.transfers[t].bytes;
    rank.sending.erase(rank.sending.begin() + static_cast<int64_t>(index));
  }

  // Whether a receive may be posted at no cost: a slot is free, or the value of
  // an outstanding one is predicted to be there by `start_ns`.
  bool HasReceiveSlot(const RankState& rank, int64_t start_ns) const {
    if (static_cast<int>(rank.receiving.size()) < limits_.max_receives_ahead) {
      return true;
    }
    return std::any_of(
        rank.receiving.begin(), rank.receiving.end(),
        [&](int t) { return transfers_[t].arrival_ns <= start_ns; });
  }

  // Waits for the outstanding receive predicted to arrive first when no slot is
  // free.
  void FreeReceiveSlot(RankState& rank) {
    if (static_cast<int>(rank.receiving.size()) < limits_.max_receives_ahead) {
      return;
    }
    WaitReceive(rank,
                *std::min_element(rank.receiving.begin(), rank.receiving.end(),
                                  [&](int a, int b) {
                                    return transfers_[a].arrival_ns <
                                           transfers_[b].arrival_ns;
                                  }));
  }

  absl::Status PostReceive(RankState& rank, const ScheduledStage& at) {
    const int t = rank.owed[rank.first_owed];
    MakeRoom(rank, programs_.transfers[t].bytes);
    AppendPostReceive(rank);
    return Note(rank, 0, at);
  }

  bool PostReceiveIfRoom(RankState& rank) {
    const int64_t bytes = programs_.transfers[rank.owed[rank.first_owed]].bytes;
    if (!Fits(rank, bytes)) return false;
    AppendPostReceive(rank);
    rank.peak_bytes =
        std::max(rank.peak_bytes, rank.held_bytes + rank.buffer_bytes);
    return true;
  }

  void AppendPostReceive(RankState& rank) {
    FreeReceiveSlot(rank);
    const int t = rank.owed[rank.first_owed++];
    AppendTransfer(rank, ActionKind::kPostRecv, t);
    rank.buffer_bytes += programs_.transfers[t].bytes;
    transfers_[t].receive_posted = true;
    rank.receiving.push_back(t);
  }

  void WaitReceive(RankState& rank, int t) {
    const int64_t from_ns = rank.now_ns;
    rank.now_ns = std::max(rank.now_ns, transfers_[t].arrival_ns);
    AppendTransfer(rank, ActionKind::kWaitRecv, t).start_ns = from_ns;
    transfers_[t].receive_waited = true;
    std::erase(rank.receiving, t);
  }

  // Issues the RELOAD of the rank's next backward ahead of `s`, if it fits
  // there and while `s` runs, which needs `growth` more bytes than are held
  // before.
  absl::Status MaybeReloadAhead(RankState& rank, const ScheduledStage& s,
                                int64_t growth) {
    if (!offloads_ || !ahead_) return absl::OkStatus();
    const std::vector<ScheduledStage>& order = schedule_.ranks[rank.number];
    if (rank.position + 1 >= order.size()) return absl::OkStatus();
    const ScheduledStage& next = order[rank.position + 1];
    if (!MakesGradient(next) || !done_[Value(PairOf(next), false)]) {
      return absl::OkStatus();
    }
    const int64_t bytes = OffloadBytes(next);
    if (bytes < 0 || !Fits(rank, bytes + std::max<int64_t>(0, growth))) {
      return absl::OkStatus();
    }
    rank.reloaded = true;
    return Reload(rank, next, bytes, s);
  }

  absl::Status Reload(RankState& rank, const ScheduledStage& s, int64_t bytes,
                      const ScheduledStage& at) {
    // A copy still going out must be over before it comes back.
    const auto it = std::find_if(
        rank.copies_out.begin(), rank.copies_out.end(), [&](const CopyOut& c) {
          return c.stage.sweep == s.sweep && c.stage.stage == s.stage;
        });
    if (it != rank.copies_out.end()) {
      WaitCopyOut(rank, *it);
      rank.copies_out.erase(it);
    }
    Append(rank, ActionKind::kReload, s);
    rank.buffer_bytes += bytes;
    return Note(rank, 0, at);
  }

  void WaitCopyOut(RankState& rank, const CopyOut& copy) {
    Append(rank, ActionKind::kWaitCopy, copy.stage);
    rank.buffer_bytes -= copy.bytes;
  }

  // An action is filled in where it stands: to copy one whose fields have just
  // been written waits for them.
  static Action& Append(RankState& rank, ActionKind kind,
                        const ScheduledStage& s) {
    Action& action = rank.program.emplace_back();
    action.kind = kind;
    action.sweep = s.sweep;
    action.stage = static_cast<int16_t>(s.stage);
    action.choice = static_cast<int16_t>(s.choice);
    action.start_ns = action.end_ns = rank.now_ns;
    return action;
  }

  Action& AppendTransfer(RankState& rank, ActionKind kind, int t) {
    const Transfer& transfer = programs_.transfers[t];
    const bool sends =
        kind == ActionKind::kPostSend || kind == ActionKind::kWaitSend;
    Action& action = rank.program.emplace_back();
    action.kind = kind;
    action.sweep = sends ? transfer.from_sweep : transfer.to_sweep;
    action.stage =
        static_cast<int16_t>(sends ? transfer.from_stage : transfer.to_stage);
    action.transfer = t;
    action.start_ns = action.end_ns = rank.now_ns;
    return action;
  }

  const StepProblem& step_;
  const ProblemGraph& graph_;
  const Schedule& schedule_;
  const StageTimes& times_;
  const ProgramLimits& limits_;
  const bool ahead_;
  const bool offloads_;  // any choice

  std::vector<int> first_chunk_;     // [sweep]: the number of its first chunk
  std::vector<int> backwards_left_;  // [chunk]
  // [edge of graph_.consumers]: the place of the producer in the consumer
  // sweep's `after`, where they are two sweeps.
  std::vector<int> place_in_after_;
  std::vector<uint8_t> done_;  // [value]: made
  // [value]: transfers into the stage that makes it, a list.
  std::vector<int> first_input_;
  std::vector<int> last_input_;
  // [value]: ranks whose next stage waits for it, a list.
  std::vector<int> first_waiter_;
  std::vector<int> next_waiter_;  // [rank]
  std::vector<RankState> ranks_;
  std::vector<TransferState> transfers_;
  StepPrograms programs_;
};

}  // namespace

absl::StatusOr<StepPrograms> Lower(const StepProblem& step,
                                   const ProblemGraph& graph,
                                   const Schedule& schedule,
                                   const StageTimes& times,
                                   const ProgramLimits& limits) {
  PW_CHECK(limits.max_receives_ahead >= 1);
  PW_CHECK(static_cast<int>(limits.memory_limit_bytes.size()) ==
           step.problem.ranks);
  absl::StatusOr<StepPrograms> programs =
      Lowering(step, graph, schedule, times, limits, /*ahead=*/true).Run();
  if (!absl::IsResourceExhausted(programs.status())) return programs;
  return Lowering(step, graph, schedule, times, limits, /*ahead=*/false).Run();
}

absl::StatusOr<StepPrograms> Lower(const StepProblem& step,
                                   const Schedule& schedule,
                                   const StageTimes& times,
                                   const ProgramLimits& limits) {
  return Lower(step, BuildProblemGraph(step.problem), schedule, times, limits);
}

}  // namespace pipeweaver::search
