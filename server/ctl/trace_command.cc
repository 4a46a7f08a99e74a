// pipeweaverctl trace: a plan as a Chrome trace and as an SVG picture.

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client_agents/cc/planner_client.h"
#include "pipeweaver/v1/planner_service.pb.h"
#include "search/lower/program_proto.h"
#include "search/lower/program_timeline.h"
#include "search/plan/plan_checker.h"
#include "search/plan/schedule_timeline.h"
#include "search/planner.h"
#include "search/problem/problem_json.h"
#include "semu/base/status_macros.h"
#include "semu/trace/chrome_trace.h"
#include "semu/trace/svg_timeline.h"
#include "semu/trace/timeline.h"
#include "server/ctl/command.h"
#include "server/ctl/planning_input.h"
#include "server/ctl/server_flags.h"

namespace pipeweaver::ctl {
namespace {

std::string Summary(int64_t makespan_ns, double bubble, double gap) {
  return absl::StrFormat(
      "makespan %.1f ms, bubble %.1f %%, without contention %.1f %% above the "
      "lower bound",
      static_cast<double>(makespan_ns) * 1e-6, bubble * 100, gap * 100);
}

absl::Status WriteTimeline(const semu::Timeline& timeline,
                           const std::string& prefix, const CommandIo& io) {
  const std::string trace = absl::StrCat(prefix, ".trace.json");
  const std::string picture = absl::StrCat(prefix, ".svg");
  PW_RETURN_IF_ERROR(WriteFile(trace, semu::ChromeTraceJson(timeline)));
  PW_RETURN_IF_ERROR(WriteFile(picture, semu::SvgTimeline(timeline, {})));
  io.out << trace << "\n" << picture << "\n";
  return absl::OkStatus();
}

std::vector<std::string> ModuleNames(const v1::Job& job) {
  std::vector<std::string> names;
  for (const v1::Module& module : job.modules()) names.push_back(module.name());
  return names;
}

// A step that a server has sealed: the picture is drawn from the very bytes
// that the ranks get.
absl::StatusOr<semu::Timeline> TimelineOfStep(const ServerFlags& server,
                                              v1::PlanKey key) {
  PW_ASSIGN_OR_RETURN(client::PlannerClient client, server.Connect());
  v1::DescribeJobRequest request;
  request.set_job(key.job());
  PW_ASSIGN_OR_RETURN(const v1::DescribeJobResponse job,
                      client.DescribeJob(request));
  if (key.attempt() == 0) key.set_attempt(job.attempt());
  PW_ASSIGN_OR_RETURN(const v1::Plan plan, client.GetPlan(key));
  std::vector<search::ParsedProgram> programs;
  for (int rank = 0; rank < plan.program_bytes_size(); ++rank) {
    PW_ASSIGN_OR_RETURN(const v1::Program program,
                        client.GetProgram(key, rank));
    PW_ASSIGN_OR_RETURN(search::ParsedProgram parsed,
                        search::ParseProgram(program.SerializeAsString()));
    programs.push_back(std::move(parsed));
  }
  PW_ASSIGN_OR_RETURN(
      semu::Timeline timeline,
      search::ProgramTimeline(programs, ModuleNames(job.job())));
  timeline.title = absl::StrCat(key.job(), ", step ", key.step(), ", replica ",
                                key.replica());
  timeline.subtitle =
      Summary(plan.report().makespan_ns(), plan.report().bubble_ratio(),
              plan.report().gap());
  return timeline;
}

absl::StatusOr<semu::Timeline> TimelineOfPlan(
    const PlanningArguments& arguments, const std::string& strategy) {
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner();
  PW_ASSIGN_OR_RETURN(const PlanningInput input,
                      ReadPlanningInput(arguments, *planner));
  search::PlanOptions options;
  options.strategy = strategy;
  options.search = arguments.search.Options();
  PW_ASSIGN_OR_RETURN(const search::StepPlan plan,
                      planner->Plan(*input.job, input.batch, options));
  semu::Timeline timeline = search::ProgramTimeline(
      plan.step, plan.programs, ModuleNames(input.job_proto));
  timeline.title =
      absl::StrCat(input.job_proto.name(), ", by ", plan.report.strategy);
  timeline.subtitle = Summary(plan.report.makespan_ns, plan.report.bubble_ratio,
                              plan.report.Gap());
  return timeline;
}

absl::StatusOr<semu::Timeline> TimelineOfFiles(
    const std::string& problem_path, const std::string& schedule_path) {
  PW_ASSIGN_OR_RETURN(const std::string problem_text,
                      ReadInputFile(problem_path));
  PW_ASSIGN_OR_RETURN(const search::Problem problem,
                      search::ParseProblemJson(problem_text));
  PW_ASSIGN_OR_RETURN(const std::string schedule_text,
                      ReadInputFile(schedule_path));
  PW_ASSIGN_OR_RETURN(const search::Schedule schedule,
                      search::ParseScheduleJson(problem, schedule_text));
  PW_ASSIGN_OR_RETURN(const search::CheckedSchedule checked,
                      search::CheckSchedule(problem, schedule));
  semu::Timeline timeline =
      search::ScheduleTimeline(problem, schedule, checked.times);
  timeline.title = problem_path;
  return timeline;
}

}  // namespace

int RunTraceCommand(absl::Span<const std::string> args, const CommandIo& io) {
  CLI::App app("Draws a plan: PREFIX.trace.json for Perfetto, PREFIX.svg.",
               "pipeweaverctl trace");
  std::string prefix;
  app.add_option("--out", prefix, "PREFIX of the files to write")->required();
  app.require_subcommand(1);
  app.fallthrough();

  CLI::App* step =
      app.add_subcommand("step", "a step that a server has sealed");
  ServerFlags server;
  std::string job;
  uint64_t step_number = 0;
  uint64_t attempt = 0;
  uint32_t replica = 0;
  step->add_option("JOB", job, "the job's name")->required();
  step->add_option("STEP", step_number, "the step")
      ->transform(WholeNumber(0, std::numeric_limits<uint64_t>::max()))
      ->required();
  server.AddTo(*step);
  step->add_option("--attempt", attempt, "default: the latest")
      ->transform(WholeNumber(0, std::numeric_limits<uint64_t>::max()));
  step->add_option("--replica", replica, "the data-parallel replica")
      ->transform(WholeNumber(0, std::numeric_limits<uint32_t>::max()))
      ->capture_default_str();

  CLI::App* plan = app.add_subcommand("plan", "a batch planned here");
  PlanningArguments arguments;
  std::string strategy;
  arguments.AddTo(*plan);
  plan->add_option("--strategy", strategy, "default: the portfolio")
      ->check(PlanStrategy());

  CLI::App* files =
      app.add_subcommand("schedule", "a problem and its schedule");
  std::string problem_path;
  std::string schedule_path;
  files->add_option("PROBLEM", problem_path, "problem file")->required();
  files->add_option("SCHEDULE", schedule_path, "schedule file")->required();
  if (const auto code = ParseArguments(app, args, io)) return *code;

  const Progress progress("drawing", io.err);
  absl::StatusOr<semu::Timeline> timeline;
  if (step->parsed()) {
    v1::PlanKey key;
    key.set_job(job);
    key.set_attempt(attempt);
    key.set_step(step_number);
    key.set_replica(replica);
    timeline = TimelineOfStep(server, std::move(key));
  } else if (plan->parsed()) {
    timeline = TimelineOfPlan(arguments, strategy);
  } else {
    timeline = TimelineOfFiles(problem_path, schedule_path);
  }
  if (!timeline.ok()) return Report(timeline.status(), io);
  const absl::Status status = WriteTimeline(*timeline, prefix, io);
  return status.ok() ? kExitOk : Report(status, io);
}

}  // namespace pipeweaver::ctl
