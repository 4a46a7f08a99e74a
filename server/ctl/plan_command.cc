// pipeweaverctl plan, compare and replay: planning here, without a server.

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "pipeweaver/v1/plan.pb.h"
#include "pipeweaver/v1/planner_service.pb.h"
#include "profiler/profile_file.h"
#include "search/joint_planner.h"
#include "search/lower/program_proto.h"
#include "search/partition/baselines.h"
#include "search/planner.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "server/ctl/command.h"
#include "server/ctl/planning_input.h"

namespace pipeweaver::ctl {
namespace {

using search::StepPlan;
using search::StepReport;

int64_t Peak(const StepReport& report) {
  int64_t peak = 0;
  for (const int64_t bytes : report.peak_memory_bytes) {
    peak = std::max(peak, bytes);
  }
  return peak;
}

// The row of one plan in the tables of plan and compare.
std::vector<Table::Cell> PlanRow(const StepReport& report) {
  return {Table::Text(report.strategy),
          Table::Milliseconds(report.makespan_ns),
          Table::Milliseconds(report.lower_bound_ns),
          Table::Percent(report.Gap()),
          Table::Percent(report.bubble_ratio),
          Table::Gibibytes(Peak(report)),
          Table::Percent(report.measured_share),
          Table::Count(report.evaluations),
          Table::Milliseconds(report.search_ns),
          Table::Milliseconds(report.check_ns),
          Table::Milliseconds(report.lower_ns)};
}

const std::vector<std::string>& PlanColumns() {
  static const auto* columns = new std::vector<std::string>{
      "strategy",  "makespan_ns", "bound_ns", "gap",
      "bubble",    "peak_bytes",  "measured", "evaluations",
      "search_ns", "check_ns",    "lower_ns"};
  return *columns;
}

// SHA-256 of each rank's actions, which do not depend on the plan's identity.
std::vector<std::string> RankDigests(const StepPlan& plan) {
  const search::PlanBytes bytes =
      search::SerializePlan(plan.step, plan.programs, v1::PlanIdentity());
  v1::Program first;
  PW_CHECK(first.ParseFromString(bytes.programs.front()));
  return {first.rank_digests().begin(), first.rank_digests().end()};
}

// The request that a plan answers, with what was answered: all that is needed
// to plan it again.
v1::SavedRequest MakeSavedRequest(const PlanningInput& input,
                                  const PlanningArguments& arguments,
                                  const std::string& strategy,
                                  const StepPlan& plan) {
  v1::SavedRequest saved;
  *saved.mutable_job() = input.job_proto;
  *saved.mutable_batch() = input.batch_proto;
  saved.set_seed(arguments.search.seed);
  saved.set_budget_evaluations(arguments.search.budget_evals);
  saved.set_strategy(strategy);
  if (input.profile) *saved.mutable_profile() = *input.profile;
  for (std::string& digest : RankDigests(plan)) {
    saved.add_rank_digests(std::move(digest));
  }
  return saved;
}

// The batches of all replicas of a step, planned together.
struct JointPlans {
  std::optional<search::DealtBatches> dealt;  // nullopt: nothing moved
  std::vector<StepPlan> plans;                // [replica]
};

// Deals microbatches out over the replicas and plans what comes out.
absl::StatusOr<JointPlans> PlanReplicas(const search::StepPlanner& planner,
                                        const search::PlannableJob& job,
                                        const std::vector<semu::Batch>& batches,
                                        const search::SearchOptions& search) {
  std::vector<const semu::Batch*> pointers;
  pointers.reserve(batches.size());
  for (const semu::Batch& batch : batches) pointers.push_back(&batch);
  JointPlans joint;
  PW_ASSIGN_OR_RETURN(joint.dealt, search::DealOut(job, pointers));
  if (joint.dealt.has_value()) {
    for (size_t r = 0; r < batches.size(); ++r) {
      pointers[r] = &joint.dealt->batches[r];
    }
  }
  search::PlanOptions options;
  options.search = search;
  for (absl::StatusOr<StepPlan>& plan :
       search::PlanJointly(planner, job, pointers, options)) {
    if (!plan.ok()) return plan.status();
    joint.plans.push_back(*std::move(plan));
  }
  return joint;
}

absl::Status CheckRepeatable(const SearchFlags& search) {
  if (search.budget_evals > 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      "--save: needs --budget-evals; a search that time ends cannot be "
      "repeated");
}

absl::Status CheckReplicas(const semu::Job& job, size_t batches) {
  const int replicas = job.parallelism.data_parallel;
  if (batches == static_cast<size_t>(replicas)) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("batches: of ", batches, " replicas, job '", job.name,
                   "' has ", replicas, " (parallelism.data_parallel)"));
}

absl::Status PlanTogether(const PlanningArguments& arguments,
                          const std::vector<std::string>& others,
                          const std::string& save, absl::string_view output,
                          const CommandIo& io) {
  const Progress progress("planning", io.err);
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner();
  PW_ASSIGN_OR_RETURN(const PlanningInput input,
                      ReadPlanningInput(arguments, *planner));
  PW_RETURN_IF_ERROR(CheckReplicas(input.job->job, others.size() + 1));
  if (!save.empty()) PW_RETURN_IF_ERROR(CheckRepeatable(arguments.search));
  v1::SavedRequest saved;
  *saved.mutable_job() = input.job_proto;
  *saved.mutable_batch() = input.batch_proto;
  saved.set_seed(arguments.search.seed);
  saved.set_budget_evaluations(arguments.search.budget_evals);
  if (input.profile) *saved.mutable_profile() = *input.profile;
  std::vector<semu::Batch> batches = {input.batch};
  for (const std::string& path : others) {
    v1::BatchMetadata& batch = *saved.add_other_replicas();
    PW_RETURN_IF_ERROR(ReadTextProto(path, batch));
    PW_ASSIGN_OR_RETURN(batches.emplace_back(),
                        semu::BatchFromProto(batch, input.job->job));
  }
  PW_ASSIGN_OR_RETURN(
      const JointPlans joint,
      PlanReplicas(*planner, *input.job, batches, arguments.search.Options()));
  std::vector<std::string> columns = PlanColumns();
  columns.insert(columns.begin(), "replica");
  columns.push_back("microbatches");
  Table table(columns);
  for (size_t r = 0; r < joint.plans.size(); ++r) {
    for (std::string& digest : RankDigests(joint.plans[r])) {
      saved.add_rank_digests(std::move(digest));
    }
    std::vector<std::string> from;
    for (size_t b = 0; b < batches[r].microbatches.size(); ++b) {
      from.push_back(joint.dealt
                         ? absl::StrCat(joint.dealt->moves[r][b].replica, "/",
                                        joint.dealt->moves[r][b].microbatch)
                         : absl::StrCat(r, "/", b));
    }
    std::vector<Table::Cell> row = PlanRow(joint.plans[r].report);
    row.insert(row.begin(), Table::Count(static_cast<int64_t>(r)));
    row.push_back(Table::Text(absl::StrJoin(from, " ")));
    table.AddRow(row);
  }
  if (!save.empty()) PW_RETURN_IF_ERROR(WriteTextProto(save, saved));
  table.Print(output, io.out);
  return absl::OkStatus();
}

absl::Status Plan(const PlanningArguments& arguments,
                  const std::string& strategy, const std::string& save,
                  absl::string_view output, const CommandIo& io) {
  if (!save.empty() && !search::BaselineFromName(strategy).has_value()) {
    PW_RETURN_IF_ERROR(CheckRepeatable(arguments.search));
  }
  const Progress progress("planning", io.err);
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner();
  PW_ASSIGN_OR_RETURN(const PlanningInput input,
                      ReadPlanningInput(arguments, *planner));
  search::PlanOptions options;
  options.strategy = strategy;
  options.search = arguments.search.Options();
  PW_ASSIGN_OR_RETURN(const StepPlan plan,
                      planner->Plan(*input.job, input.batch, options));
  if (!save.empty()) {
    PW_RETURN_IF_ERROR(WriteTextProto(
        save, MakeSavedRequest(input, arguments, strategy, plan)));
  }
  Table table(PlanColumns());
  table.AddRow(PlanRow(plan.report));
  table.Print(output, io.out);
  return absl::OkStatus();
}

absl::Status Compare(const PlanningArguments& arguments,
                     std::vector<std::string> strategies,
                     absl::string_view output, const CommandIo& io) {
  const Progress progress("comparing", io.err);
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner();
  PW_ASSIGN_OR_RETURN(const PlanningInput input,
                      ReadPlanningInput(arguments, *planner));
  if (strategies.empty()) strategies = planner->StrategyNames();
  std::vector<std::string> columns = PlanColumns();
  columns.push_back("gain_of_first");
  columns.push_back("error");
  Table table(columns);
  std::optional<int64_t> first_ns;
  for (const std::string& strategy : strategies) {
    search::PlanOptions options;
    options.strategy = strategy;
    options.search = arguments.search.Options();
    const absl::StatusOr<StepPlan> plan =
        planner->Plan(*input.job, input.batch, options);
    std::vector<Table::Cell> row;
    if (plan.ok()) {
      row = PlanRow(plan->report);
      if (!first_ns) first_ns = plan->report.makespan_ns;
      row.push_back(Table::Percent(
          static_cast<double>(plan->report.makespan_ns) / *first_ns - 1));
      row.push_back(Table::Text(""));
    } else if (absl::IsInvalidArgument(plan.status())) {
      return plan.status();
    } else {
      row.assign(columns.size() - 1, {nullptr, "-"});
      row[0] = Table::Text(strategy);
      row.push_back(Table::Text(plan.status().message()));
    }
    table.AddRow(std::move(row));
  }
  table.Print(output, io.out);
  return absl::OkStatus();
}

absl::Status Replay(const std::string& path, int threads, bool& same,
                    const CommandIo& io) {
  const Progress progress("replaying", io.err);
  v1::SavedRequest saved;
  PW_RETURN_IF_ERROR(ReadTextProto(path, saved));
  const std::unique_ptr<search::StepPlanner> planner =
      search::MakeStepPlanner();
  PW_ASSIGN_OR_RETURN(const semu::Job job, semu::JobFromProto(saved.job()));
  PW_ASSIGN_OR_RETURN(const semu::Layout layout,
                      semu::LayoutFromProto(saved.job().layout(), job));
  search::PrepareOptions measured;
  if (saved.has_profile()) {
    if (const absl::Status status = profiler::ValidateProfile(saved.profile());
        !status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": profile: ", status.message()));
    }
    measured = MeasuredBy(saved.profile(), job, *planner);
  }
  PW_ASSIGN_OR_RETURN(const auto prepared,
                      planner->Prepare(job, layout, measured));
  PW_ASSIGN_OR_RETURN(const semu::Batch batch,
                      semu::BatchFromProto(saved.batch(), job));
  const bool searches = !search::BaselineFromName(saved.strategy()).has_value();
  if (saved.budget_evaluations() < (searches ? 1 : 0)) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": budget_evaluations: ", saved.budget_evaluations(),
        ", must be ",
        searches ? "above 0 for a strategy that searches" : "0 or more"));
  }
  search::PlanOptions options;
  options.strategy = saved.strategy();
  options.search.seed = saved.seed();
  options.search.threads = threads;
  options.search.budget.evaluations = saved.budget_evaluations();
  std::vector<std::string> digests;
  if (saved.other_replicas_size() > 0) {
    std::vector<semu::Batch> batches = {batch};
    for (const v1::BatchMetadata& other : saved.other_replicas()) {
      PW_ASSIGN_OR_RETURN(batches.emplace_back(),
                          semu::BatchFromProto(other, job));
    }
    PW_RETURN_IF_ERROR(CheckReplicas(job, batches.size()));
    PW_ASSIGN_OR_RETURN(
        const JointPlans joint,
        PlanReplicas(*planner, *prepared, batches, options.search));
    for (const StepPlan& plan : joint.plans) {
      for (std::string& digest : RankDigests(plan)) {
        digests.push_back(std::move(digest));
      }
    }
  } else {
    PW_ASSIGN_OR_RETURN(const StepPlan plan,
                        planner->Plan(*prepared, batch, options));
    digests = RankDigests(plan);
  }
  const int ranks = job.parallelism.pipeline_parallel;
  same = static_cast<int>(digests.size()) == saved.rank_digests_size();
  for (int rank = 0; rank < static_cast<int>(digests.size()); ++rank) {
    const bool equal = rank < saved.rank_digests_size() &&
                       digests[rank] == saved.rank_digests(rank);
    same = same && equal;
    if (saved.other_replicas_size() > 0) {
      io.out << "replica " << rank / ranks << ", ";
    }
    io.out << "rank " << rank % ranks << ": "
           << absl::BytesToHexString(digests[rank]) << " "
           << (equal ? "same" : "differs") << "\n";
  }
  return absl::OkStatus();
}

}  // namespace

int RunPlanCommand(absl::Span<const std::string> args, const CommandIo& io) {
  CLI::App app("Plans a batch of a job here, without a server.",
               "pipeweaverctl plan");
  PlanningArguments arguments;
  std::string strategy;
  std::string save;
  std::vector<std::string> others;
  std::string output = "table";
  arguments.AddTo(app);
  app.add_option("--strategy", strategy, "default: the portfolio")
      ->check(PlanStrategy());
  app.add_option("--save", save,
                 "file for the request, to `replay`; needs --budget-evals");
  app.add_option("--move-with", others,
                 "batches of the step's other replicas (v1.BatchMetadata as "
                 "text): microbatches are dealt out over all replicas, which "
                 "are planned together, with one budget for all")
      ->excludes("--strategy");
  AddOutputOption(app, output);
  if (const auto code = ParseArguments(app, args, io)) return *code;
  const absl::Status status =
      others.empty() ? Plan(arguments, strategy, save, output, io)
                     : PlanTogether(arguments, others, save, output, io);
  return status.ok() ? kExitOk : Report(status, io);
}

int RunCompareCommand(absl::Span<const std::string> args, const CommandIo& io) {
  CLI::App app(
      "Plans a batch with several strategies; gains are of the first over "
      "each. A * marks a system rebuilt here from its paper.",
      "pipeweaverctl compare");
  PlanningArguments arguments;
  std::vector<std::string> strategies;
  std::string output = "table";
  arguments.AddTo(app);
  app.add_option("--strategies", strategies, "names; default: all")
      ->delimiter(',')
      ->check(PlanStrategy());
  AddOutputOption(app, output);
  if (const auto code = ParseArguments(app, args, io)) return *code;
  const absl::Status status =
      Compare(arguments, std::move(strategies), output, io);
  return status.ok() ? kExitOk : Report(status, io);
}

int RunReplayCommand(absl::Span<const std::string> args, const CommandIo& io) {
  CLI::App app("Plans a saved request again and compares the bytes.",
               "pipeweaverctl replay");
  std::string path;
  int threads = 2;
  app.add_option("FILE", path, "what `plan --save` wrote")->required();
  app.add_option("--threads", threads, "of the search; the bytes do not change")
      ->transform(WholeNumber(1, 256))
      ->capture_default_str();
  if (const auto code = ParseArguments(app, args, io)) return *code;
  bool same = false;
  const absl::Status status = Replay(path, threads, same, io);
  if (!status.ok()) return Report(status, io);
  return same ? kExitOk : kExitFailed;
}

}  // namespace pipeweaver::ctl
