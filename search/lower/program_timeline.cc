#include "search/lower/program_timeline.h"

#include <map>
#include <tuple>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace pipeweaver::search {
namespace {

char KindLetter(ActionKind kind) { return "FBIW"[static_cast<int>(kind)]; }

bool IsGradient(ActionKind kind) {
  return kind == ActionKind::kBackward || kind == ActionKind::kInputGrad;
}

std::string Detail(uint32_t sub_microbatch, uint32_t segment, uint32_t chunk,
                   absl::string_view choice) {
  return absl::StrCat("sub-microbatch ", sub_microbatch, ", segment ", segment,
                      ", chunk ", chunk, ", choice ", choice);
}

}  // namespace

semu::Timeline ProgramTimeline(const StepProblem& step,
                               const StepPrograms& programs,
                               const std::vector<std::string>& modules) {
  semu::Timeline timeline;
  timeline.ranks = static_cast<int>(programs.ranks.size());
  timeline.modules = modules;
  // Span of the action that makes or takes a value: (sweep, stage, gradient).
  std::map<std::tuple<int, int, bool>, int> spans;
  for (int r = 0; r < timeline.ranks; ++r) {
    for (const Action& a : programs.ranks[r]) {
      if (!IsCompute(a.kind)) continue;
      const SweepOrigin& origin = step.sweeps[a.sweep];
      const SubMicrobatch& sub = step.sub_microbatches[origin.sub_microbatch];
      if (a.kind != ActionKind::kWeightGrad) {
        spans[{a.sweep, a.stage, IsGradient(a.kind)}] =
            static_cast<int>(timeline.spans.size());
      }
      timeline.spans.push_back(
          {r, a.start_ns, a.end_ns, KindLetter(a.kind), sub.module,
           sub.microbatch,
           Detail(origin.sub_microbatch, origin.segment, a.stage,
                  step.choices[sub.module][origin.segment][a.stage][a.choice]
                      .name)});
    }
  }
  for (const Transfer& x : programs.transfers) {
    timeline.transfers.push_back(
        {spans[{x.from_sweep, x.from_stage, x.gradient}],
         spans[{x.to_sweep, x.to_stage, x.gradient}], x.gradient, x.bytes});
  }
  return timeline;
}

absl::StatusOr<semu::Timeline> ProgramTimeline(
    const std::vector<ParsedProgram>& programs,
    const std::vector<std::string>& modules) {
  semu::Timeline timeline;
  timeline.ranks = static_cast<int>(programs.size());
  timeline.modules = modules;
  // By transfer: the spans at its ends, and what crosses.
  std::map<uint32_t, semu::TimelineTransfer> transfers;
  for (int r = 0; r < timeline.ranks; ++r) {
    const ParsedProgram& program = programs[r];
    if (program.rank != r || program.num_ranks != timeline.ranks) {
      return absl::InvalidArgumentError(absl::StrCat(
          "programs[", r, "]: of rank ", program.rank, " of ",
          program.num_ranks, ", must be rank ", r, " of ", timeline.ranks));
    }
    if (program.plan_digest != programs[0].plan_digest) {
      return absl::InvalidArgumentError(
          absl::StrCat("programs[", r, "]: of another plan than programs[0]"));
    }
    // Spans by what they make or take.
    std::map<std::tuple<uint32_t, uint32_t, uint32_t, bool>, int> spans;
    for (const ProgramRow& row : program.rows) {
      if (!IsCompute(row.kind)) continue;
      for (size_t m = timeline.modules.size(); m <= row.module; ++m) {
        timeline.modules.push_back(absl::StrCat("module ", m));
      }
      if (row.kind != ActionKind::kWeightGrad) {
        spans[{row.sub_microbatch, row.segment, row.chunk,
               IsGradient(row.kind)}] = static_cast<int>(timeline.spans.size());
      }
      timeline.spans.push_back(
          {r, row.start_ns, row.end_ns, KindLetter(row.kind),
           static_cast<int>(row.module), static_cast<int>(row.microbatch),
           Detail(row.sub_microbatch, row.segment, row.chunk,
                  absl::StrCat(row.choice))});
    }
    for (const ProgramRow& row : program.rows) {
      const bool sends = row.kind == ActionKind::kPostSend;
      if (!sends && row.kind != ActionKind::kPostRecv) continue;
      const auto span = spans.find(
          {row.sub_microbatch, row.segment, row.chunk, row.gradient});
      if (span == spans.end()) {
        return absl::InvalidArgumentError(
            absl::StrCat("programs[", r, "]: transfer ", row.transfer,
                         " belongs to a stage that the program does not run"));
      }
      semu::TimelineTransfer& transfer =
          transfers.try_emplace(row.transfer, semu::TimelineTransfer{-1, -1})
              .first->second;
      (sends ? transfer.from_span : transfer.to_span) = span->second;
      transfer.gradient = row.gradient;
      transfer.bytes = static_cast<int64_t>(row.bytes);
    }
  }
  for (const auto& [number, transfer] : transfers) {
    if (transfer.from_span < 0 || transfer.to_span < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("programs: transfer ", number, " has one end only"));
    }
    timeline.transfers.push_back(transfer);
  }
  return timeline;
}

}  // namespace pipeweaver::search
