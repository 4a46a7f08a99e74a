// `pipeweaverctl schedule` and `simulate`; see schedule_command.h.

#include "server/ctl/schedule_command.h"

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "search/plan/bubble_causes.h"
#include "search/problem/bound.h"
#include "search/problem/field_error.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_json.h"
#include "search/problem/timing.h"
#include "search/strategy/registry.h"
#include "search/strategy/strategy.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "server/ctl/search_flags.h"

namespace pipeweaver::ctl {
namespace {

constexpr int64_t kDefaultBudgetMs = 1000;

// The one JSON object that a refused input gets.
int Refuse(const absl::Status& status, std::ostream& err) {
  const search::FieldErrorParts parts = search::GetFieldErrorParts(status);
  err << "{\"error\": " << search::JsonString(status.message())
      << ", \"field\": " << search::JsonString(parts.field)
      << ", \"value\": " << search::JsonString(parts.value)
      << ", \"rule\": " << search::JsonString(parts.rule) << "}\n";
  return kExitBadInput;
}

absl::StatusOr<search::Problem> ReadProblem(const std::string& path) {
  PW_ASSIGN_OR_RETURN(const std::string text, ReadInputFile(path));
  return search::ParseProblemJson(text);
}

// Times may need all 64 bits.
std::string TimeText(int64_t ns) {
  return absl::StrCat(static_cast<uint64_t>(ns));
}

// A makespan that meets the one bound meets both.
search::LowerBounds BoundsOf(const search::ProblemGraph& graph,
                             int64_t makespan_ns) {
  const int64_t path_ns = search::LowerBound(graph);
  if (path_ns == makespan_ns) return {path_ns, path_ns};
  return search::FindLowerBounds(graph);
}

// The ranks' idle time by cause; null where times are too long to add up.
std::string BubblesText(const search::ProblemGraph& graph,
                        const search::Schedule& schedule,
                        const search::StageTimes& times) {
  constexpr double kMostNs = 0x1p62;
  if (static_cast<double>(static_cast<uint64_t>(times.makespan_ns)) *
          graph.ranks >=
      kMostNs) {
    return "null";
  }
  const search::BubbleCauses causes =
      search::FindBubbleCauses(graph, schedule, times);
  return absl::StrCat("{\"imbalance_ns\": ", causes.imbalance_ns,
                      ", \"dependency_ns\": ", causes.dependency_ns,
                      ", \"memory_ns\": ", causes.memory_ns,
                      ", \"transfer_ns\": ", causes.transfer_ns, "}");
}

}  // namespace

int RunScheduleCommand(absl::Span<const std::string> args,
                       const CommandIo& io) {
  CLI::App app("Solves a problem file and prints the schedule.",
               "pipeweaverctl schedule");
  std::string problem_path;
  std::string strategy_name = search::StrategyNames().front();
  SearchFlags flags;
  flags.budget_ms = kDefaultBudgetMs;
  app.add_option("PROBLEM", problem_path, "problem file, .json or .json.gz")
      ->required();
  flags.AddTo(app);
  app.add_option("--strategy", strategy_name, "how to search")
      ->check(CLI::IsMember(search::StrategyNames()))
      ->capture_default_str();
  if (const auto code = ParseArguments(app, args, io)) return *code;
  const std::unique_ptr<search::Strategy> strategy =
      search::MakeStrategy(strategy_name);
  PW_CHECK(strategy != nullptr);
  const absl::StatusOr<search::Problem> problem = ReadProblem(problem_path);
  if (!problem.ok()) return Refuse(problem.status(), io.err);

  const search::ProblemGraph graph = search::BuildProblemGraph(*problem);
  const absl::StatusOr<search::SearchResult> result =
      strategy->Solve(graph, flags.Options());
  if (!result.ok()) return Refuse(result.status(), io.err);

  const absl::StatusOr<search::StageTimes> times =
      search::TimeSchedule(graph, result->schedule);
  PW_CHECK(times.ok());
  PW_CHECK(search::CheckMemory(graph, result->schedule).ok());
  const search::LowerBounds bounds = BoundsOf(graph, times->makespan_ns);
  io.out << search::ScheduleToJson(
      *problem, result->schedule, *times,
      {{"makespan_ns", TimeText(times->makespan_ns)},
       {"lower_bound_ns", TimeText(bounds.path_ns)},
       {"flow_lower_bound_ns", TimeText(bounds.flow_ns)},
       {"bubbles", BubblesText(graph, result->schedule, *times)},
       {"strategy", search::JsonString(strategy->name())},
       {"evaluations", absl::StrCat(result->evaluations)}});
  io.out.flush();
  return io.out.good() ? kExitOk : kExitFailed;
}

int RunSimulateCommand(absl::Span<const std::string> args,
                       const CommandIo& io) {
  CLI::App app("Times a given schedule of a problem file.",
               "pipeweaverctl simulate");
  std::string problem_path;
  std::string schedule_path;
  app.add_option("PROBLEM", problem_path, "problem file, .json or .json.gz")
      ->required();
  app.add_option("SCHEDULE", schedule_path, "schedule file, .json or .json.gz")
      ->required();
  if (const auto code = ParseArguments(app, args, io)) return *code;
  const absl::StatusOr<search::Problem> problem = ReadProblem(problem_path);
  if (!problem.ok()) return Refuse(problem.status(), io.err);
  const absl::StatusOr<std::string> text = ReadInputFile(schedule_path);
  if (!text.ok()) return Refuse(text.status(), io.err);
  const absl::StatusOr<search::Schedule> schedule =
      search::ParseScheduleJson(*problem, *text);
  if (!schedule.ok()) return Refuse(schedule.status(), io.err);
  const search::ProblemGraph graph = search::BuildProblemGraph(*problem);
  const absl::StatusOr<search::StageTimes> times =
      search::TimeSchedule(graph, *schedule);
  if (!times.ok()) return Refuse(times.status(), io.err);
  if (const absl::Status fits = search::CheckMemory(graph, *schedule);
      !fits.ok()) {
    return Refuse(fits, io.err);
  }
  const search::LowerBounds bounds = BoundsOf(graph, times->makespan_ns);
  if (const absl::Status exact =
          search::CheckExact(*text, {{"makespan_ns", times->makespan_ns},
                                     {"lower_bound_ns", bounds.path_ns}});
      !exact.ok()) {
    return Refuse(exact, io.err);
  }
  io.out << search::ScheduleToJson(
      *problem, *schedule, *times,
      {{"makespan_ns", TimeText(times->makespan_ns)},
       {"lower_bound_ns", TimeText(bounds.path_ns)},
       {"flow_lower_bound_ns", TimeText(bounds.flow_ns)},
       {"bubbles", BubblesText(graph, *schedule, *times)},
       {"peak_bytes",
        absl::StrCat("[",
                     absl::StrJoin(search::PeakBytes(graph, *schedule), ", "),
                     "]")}});
  io.out.flush();
  return io.out.good() ? kExitOk : kExitFailed;
}

}  // namespace pipeweaver::ctl
