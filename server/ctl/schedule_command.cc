// `pipeweaverctl schedule` and `simulate`; see schedule_command.h.

#include "server/ctl/schedule_command.h"

#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "search/plan/bubble_causes.h"
#include "search/problem/bound.h"
#include "search/problem/field_error.h"
#include "search/problem/input_file.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_json.h"
#include "search/problem/timing.h"
#include "search/strategy/registry.h"
#include "search/strategy/strategy.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::ctl {
namespace {

constexpr char kUsage[] =
    "usage: pipeweaverctl schedule PROBLEM.json[.gz] "
    "[--budget-ms N | --budget-evals N] [--seed S] [--threads T] "
    "[--strategy NAME]\n"
    "       pipeweaverctl simulate PROBLEM.json[.gz] SCHEDULE.json[.gz]\n";

constexpr int64_t kDefaultBudgetMs = 1000;
constexpr int kMostThreads = 256;

// The one JSON object that a refused input gets.
int Refuse(const absl::Status& status, std::ostream& err) {
  const search::FieldErrorParts parts = search::GetFieldErrorParts(status);
  err << "{\"error\": " << search::JsonString(status.message())
      << ", \"field\": " << search::JsonString(parts.field)
      << ", \"value\": " << search::JsonString(parts.value)
      << ", \"rule\": " << search::JsonString(parts.rule) << "}\n";
  return kExitBadInput;
}

struct ScheduleFlags {
  std::string problem_path;
  std::string strategy = "portfolio";
  int64_t budget_ms = 0;
  int64_t budget_evaluations = 0;
  uint64_t seed = 1;
  int threads = 2;
};

absl::StatusOr<ScheduleFlags> ParseScheduleFlags(
    absl::Span<const std::string> args) {
  ScheduleFlags flags;
  for (size_t i = 0; i < args.size(); ++i) {
    const std::string& arg = args[i];
    if (arg.substr(0, 2) != "--") {
      if (!flags.problem_path.empty()) {
        return absl::InvalidArgumentError(absl::StrCat("unexpected ", arg));
      }
      flags.problem_path = arg;
      continue;
    }
    std::string name = arg, value;
    if (const size_t equals = arg.find('='); equals != std::string::npos) {
      name = arg.substr(0, equals);
      value = arg.substr(equals + 1);
    } else if (i + 1 < args.size()) {
      value = args[++i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat(name, " needs a value"));
    }
    const auto number = [&](int64_t least, int64_t most,
                            int64_t& to) -> absl::Status {
      if (absl::SimpleAtoi(value, &to) && to >= least && to <= most) {
        return absl::OkStatus();
      }
      return absl::InvalidArgumentError(absl::StrCat(
          name, " is ", value, ": must be from ", least, " to ", most));
    };
    int64_t parsed = 0;
    if (name == "--budget-ms") {
      PW_RETURN_IF_ERROR(number(1, 86'400'000, flags.budget_ms));
    } else if (name == "--budget-evals") {
      PW_RETURN_IF_ERROR(number(1, std::numeric_limits<int64_t>::max(),
                                flags.budget_evaluations));
    } else if (name == "--seed") {
      if (!absl::SimpleAtoi(value, &flags.seed)) {
        return absl::InvalidArgumentError(
            absl::StrCat("--seed is ", value, ": must be an integer >= 0"));
      }
    } else if (name == "--threads") {
      PW_RETURN_IF_ERROR(number(1, kMostThreads, parsed));
      flags.threads = static_cast<int>(parsed);
    } else if (name == "--strategy") {
      flags.strategy = value;
    } else {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag ", name));
    }
  }
  if (flags.problem_path.empty()) {
    return absl::InvalidArgumentError("no problem file given");
  }
  if (flags.budget_ms > 0 && flags.budget_evaluations > 0) {
    return absl::InvalidArgumentError(
        "--budget-ms and --budget-evals exclude each other");
  }
  if (flags.budget_ms == 0 && flags.budget_evaluations == 0) {
    flags.budget_ms = kDefaultBudgetMs;
  }
  return flags;
}

absl::StatusOr<search::Problem> ReadProblem(const std::string& path) {
  PW_ASSIGN_OR_RETURN(const std::string text, search::ReadInputFile(path));
  return search::ParseProblemJson(text);
}

// Times may need all 64 bits.
std::string TimeText(int64_t ns) {
  return absl::StrCat(static_cast<uint64_t>(ns));
}

// The ranks' idle time by cause; null where times are too long to add up.
std::string BubblesText(const search::Problem& problem,
                        const search::Schedule& schedule,
                        const search::StageTimes& times) {
  constexpr double kMostNs = 0x1p62;
  if (static_cast<double>(static_cast<uint64_t>(times.makespan_ns)) *
          problem.ranks >=
      kMostNs) {
    return "null";
  }
  const search::BubbleCauses causes =
      search::FindBubbleCauses(problem, schedule, times);
  return absl::StrCat("{\"imbalance_ns\": ", causes.imbalance_ns,
                      ", \"dependency_ns\": ", causes.dependency_ns,
                      ", \"memory_ns\": ", causes.memory_ns,
                      ", \"transfer_ns\": ", causes.transfer_ns, "}");
}

}  // namespace

int RunScheduleCommand(absl::Span<const std::string> args,
                       const CommandIo& io) {
  const absl::StatusOr<ScheduleFlags> flags = ParseScheduleFlags(args);
  if (!flags.ok()) {
    io.err << flags.status().message() << "\n" << kUsage;
    return kExitUsage;
  }
  const std::unique_ptr<search::Strategy> strategy =
      search::MakeStrategy(flags->strategy);
  if (strategy == nullptr) {
    io.err << "--strategy is " << flags->strategy << ": must be one of "
           << absl::StrJoin(search::StrategyNames(), ", ") << "\n"
           << kUsage;
    return kExitUsage;
  }
  const absl::StatusOr<search::Problem> problem =
      ReadProblem(flags->problem_path);
  if (!problem.ok()) return Refuse(problem.status(), io.err);

  const search::ProblemGraph graph = search::BuildProblemGraph(*problem);
  search::SearchOptions options;
  options.seed = flags->seed;
  options.threads = flags->threads;
  options.budget.evaluations = flags->budget_evaluations;
  if (flags->budget_ms > 0) {
    options.budget.deadline = std::chrono::steady_clock::now() +
                              std::chrono::milliseconds(flags->budget_ms);
  }
  const absl::StatusOr<search::SearchResult> result =
      strategy->Solve(graph, options);
  if (!result.ok()) return Refuse(result.status(), io.err);

  const absl::StatusOr<search::StageTimes> times =
      search::TimeSchedule(graph, result->schedule);
  PW_CHECK(times.ok());
  PW_CHECK(search::CheckMemory(graph, result->schedule).ok());
  io.out << search::ScheduleToJson(
      *problem, result->schedule, *times,
      {{"makespan_ns", TimeText(times->makespan_ns)},
       {"lower_bound_ns", TimeText(search::LowerBound(graph))},
       {"flow_lower_bound_ns", TimeText(search::FlowLowerBound(graph))},
       {"bubbles", BubblesText(*problem, result->schedule, *times)},
       {"strategy", search::JsonString(strategy->name())},
       {"evaluations", absl::StrCat(result->evaluations)}});
  io.out.flush();
  return io.out.good() ? kExitOk : kExitFailed;
}

int RunSimulateCommand(absl::Span<const std::string> args,
                       const CommandIo& io) {
  if (args.size() != 2) {
    io.err << kUsage;
    return kExitUsage;
  }
  const absl::StatusOr<search::Problem> problem = ReadProblem(args[0]);
  if (!problem.ok()) return Refuse(problem.status(), io.err);
  const absl::StatusOr<std::string> text = search::ReadInputFile(args[1]);
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
  io.out << search::ScheduleToJson(
      *problem, *schedule, *times,
      {{"makespan_ns", TimeText(times->makespan_ns)},
       {"lower_bound_ns", TimeText(search::LowerBound(graph))},
       {"flow_lower_bound_ns", TimeText(search::FlowLowerBound(graph))},
       {"bubbles", BubblesText(*problem, *schedule, *times)},
       {"peak_bytes",
        absl::StrCat("[",
                     absl::StrJoin(search::PeakBytes(graph, *schedule), ", "),
                     "]")}});
  io.out.flush();
  return io.out.good() ? kExitOk : kExitFailed;
}

}  // namespace pipeweaver::ctl
