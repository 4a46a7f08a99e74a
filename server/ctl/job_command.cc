// pipeweaverctl job: asks a running planner about its jobs.

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client_agents/cc/planner_client.h"
#include "nlohmann/json.hpp"
#include "pipeweaver/v1/planner_service.pb.h"
#include "profiler/profile_file.h"
#include "semu/base/check.h"
#include "server/ctl/command.h"
#include "server/ctl/planning_input.h"
#include "server/ctl/server_flags.h"

namespace pipeweaver::ctl {
namespace {

// Digests in hexadecimal, as logs and tables have them, for protobuf's base64.
void SpellDigests(nlohmann::ordered_json& value, bool is_digest) {
  if (value.is_string() && is_digest) {
    std::string bytes;
    PW_CHECK(absl::Base64Unescape(value.get<std::string>(), &bytes));
    value = absl::BytesToHexString(bytes);
  } else if (value.is_array()) {
    for (auto& element : value) SpellDigests(element, is_digest);
  } else if (value.is_object()) {
    for (auto& [key, element] : value.items()) {
      SpellDigests(element, absl::EndsWith(key, "_digest") ||
                                absl::EndsWith(key, "_digests"));
    }
  }
}

// A message as JSON with the field names of the .proto files.
std::string ToJson(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  options.always_print_primitive_fields = true;
  std::string json;
  PW_CHECK(google::protobuf::util::MessageToJsonString(message, &json, options)
               .ok());
  auto value = nlohmann::ordered_json::parse(json);
  SpellDigests(value, /*is_digest=*/false);
  return value.dump();
}

int List(client::PlannerClient& client, absl::string_view output,
         const CommandIo& io) {
  const auto response = client.ListJobs({});
  if (!response.ok()) return Report(response.status(), io);
  Table table({"job"});
  for (const std::string& job : response->jobs()) {
    table.AddRow({Table::Text(job)});
  }
  table.Print(output, io.out);
  return kExitOk;
}

int Describe(client::PlannerClient& client, const std::string& name,
             absl::string_view output, const CommandIo& io) {
  v1::DescribeJobRequest request;
  request.set_job(name);
  const auto response = client.DescribeJob(request);
  if (!response.ok()) return Report(response.status(), io);
  if (output == "json") {
    io.out << ToJson(*response) << "\n";
    return kExitOk;
  }
  Table table({"property", "value"});
  const auto row = [&table](absl::string_view property,
                            absl::string_view value) {
    table.AddRow({Table::Text(property), Table::Text(value)});
  };
  row("job digest", absl::BytesToHexString(response->job_digest()));
  row("attempt", absl::StrCat(response->attempt()));
  row("layout digest", absl::BytesToHexString(response->layout_digest()));
  row("layout confirmed", response->layout_confirmed() ? "yes" : "no");
  row("replicas",
      absl::StrCat(std::max(1, response->job().parallelism().data_parallel())));
  row("microbatches may move between replicas",
      response->job().executor().moved_microbatches() ? "yes" : "no");
  row("steps held", absl::StrCat(response->steps_held()));
  for (int i = 0; i < response->plans_by_origin_size(); ++i) {
    if (response->plans_by_origin(i) == 0) continue;
    row(absl::StrCat("plans, ",
                     v1::PlanOrigin_Name(static_cast<v1::PlanOrigin>(i))),
        absl::StrCat(response->plans_by_origin(i)));
  }
  row("reports", absl::StrCat(response->reports()));
  if (response->reports() > 0) {
    row("measured over predicted",
        absl::StrCat(response->measured_over_predicted()));
  }
  const v1::JobCosts& costs = response->costs();
  row("costs version", absl::StrCat(costs.version()));
  row("measured layers", absl::StrCat(costs.measured_layers()));
  if (costs.observations() > 0) {
    row("stage times calibrated on", absl::StrCat(costs.observations()));
    row("error before, after",
        absl::StrFormat("%.2f %%, %.2f %%", 100 * costs.error_before(),
                        100 * costs.error_after()));
  }
  if (costs.extra_reserve_bytes_size() > 0) {
    row("extra reserve, bytes",
        absl::StrJoin(costs.extra_reserve_bytes(), ", "));
  }
  row("steps drifted", absl::StrCat(costs.drifted_steps()));
  for (int m = 0; m < response->layout().modules_size(); ++m) {
    const v1::ModuleLayout& module = response->layout().modules(m);
    for (int s = 0; s < module.segments_size(); ++s) {
      std::string chunks;
      for (const v1::Chunk& chunk : module.segments(s).chunks()) {
        absl::StrAppend(&chunks, chunks.empty() ? "" : ", ", "rank ",
                        chunk.rank(), ": ", chunk.num_layers());
      }
      row(absl::StrCat("layers, ", module.module(), " segment ", s), chunks);
    }
  }
  table.Print(output, io.out);
  return kExitOk;
}

int Register(client::PlannerClient& client, const std::string& job,
             const std::string& request_id,
             const std::vector<std::string>& samples, absl::string_view output,
             const CommandIo& io) {
  absl::StatusOr<v1::Job> read = ReadJob(job);
  if (!read.ok()) return Report(read.status(), io);
  v1::RegisterJobRequest request;
  request.set_request_id(request_id);
  *request.mutable_job() = *std::move(read);
  if (absl::Status status =
          ReadSamples(samples, request.mutable_sample_batches());
      !status.ok()) {
    return Report(status, io);
  }
  const auto response = client.RegisterJob(request);
  if (!response.ok()) return Report(response.status(), io);
  if (!response->layout_confirmed()) {
    v1::ConfirmLayoutRequest confirm;
    confirm.set_job(request.job().name());
    confirm.set_attempt(response->attempt());
    confirm.set_layout_digest(response->layout_digest());
    if (const auto confirmed = client.ConfirmLayout(confirm); !confirmed.ok()) {
      return Report(confirmed.status(), io);
    }
  }
  if (output == "json") {
    io.out << ToJson(*response) << "\n";
  } else {
    io.out << request.job().name() << ": attempt " << response->attempt()
           << ", layout "
           << absl::BytesToHexString(response->layout_digest()).substr(0, 12)
           << " confirmed\n";
  }
  return kExitOk;
}

int UploadProfile(client::PlannerClient& client, const std::string& name,
                  const std::string& path, absl::string_view output,
                  const CommandIo& io) {
  absl::StatusOr<v1::Profile> profile = profiler::ReadProfileFile(path);
  if (!profile.ok()) return Report(profile.status(), io);
  v1::UploadProfileRequest request;
  request.set_job(name);
  *request.mutable_profile() = *std::move(profile);
  const auto response = client.UploadProfile(request);
  if (!response.ok()) return Report(response.status(), io);
  if (output == "json") {
    io.out << ToJson(*response) << "\n";
  } else {
    io.out << name << ": " << response->points_taken() << " points taken, "
           << response->points_left_out()
           << " left out that are not of its layers\n";
  }
  return kExitOk;
}

// Which of the plan's microbatches other replicas submitted.
template <typename Row>
void AddMoves(const v1::Plan& plan, const Row& row) {
  const v1::MicrobatchMoves& moves = plan.moves();
  const uint32_t own = plan.identity().key().replica();
  if (own >= static_cast<uint32_t>(moves.num_microbatches_size())) return;
  int first = 0;
  for (uint32_t r = 0; r < own; ++r) {
    first += static_cast<int>(moves.num_microbatches(static_cast<int>(r)));
  }
  const int count =
      static_cast<int>(moves.num_microbatches(static_cast<int>(own)));
  int moved = 0;
  for (int b = 0; b < count; ++b) {
    if (moves.from_replica(first + b) != own) ++moved;
  }
  row("microbatches of other replicas", Table::Count(moved));
  for (int b = 0; b < count; ++b) {
    if (moves.from_replica(first + b) == own) continue;
    row(absl::StrCat("microbatch ", b),
        Table::Text(
            absl::StrCat("microbatch ", moves.from_microbatch(first + b),
                         " of replica ", moves.from_replica(first + b))));
  }
}

int ShowPlan(client::PlannerClient& client, const v1::PlanKey& key,
             absl::string_view output, const CommandIo& io) {
  const auto plan = client.GetPlan(key);
  if (!plan.ok()) return Report(plan.status(), io);
  if (output == "json") {
    io.out << ToJson(*plan) << "\n";
    return kExitOk;
  }
  const v1::PlanReport& report = plan->report();
  Table table({"property", "value"});
  const auto row = [&table](absl::string_view property, Table::Cell value) {
    table.AddRow({Table::Text(property), std::move(value)});
  };
  row("plan digest", Table::Text(absl::BytesToHexString(plan->plan_digest())));
  row("sealed", Table::Text(v1::PlanOrigin_Name(plan->identity().origin())));
  row("makespan", Table::Milliseconds(report.makespan_ns()));
  row("lower bound", Table::Milliseconds(report.lower_bound_ns()));
  row("gap", Table::Percent(report.gap()));
  row("bubble", Table::Percent(report.bubble_ratio()));
  row("schedules evaluated", Table::Count(report.evaluations()));
  row("search", Table::Milliseconds(report.search_ns()));
  row("checks", Table::Milliseconds(report.check_ns()));
  AddMoves(*plan, row);
  table.Print(output, io.out);
  return kExitOk;
}

}  // namespace

int RunJobCommand(absl::Span<const std::string> args, const CommandIo& io) {
  CLI::App app("Asks a running planner about its jobs.", "pipeweaverctl job");
  ServerFlags server;
  std::string output = "table";
  std::string name;
  std::string request_id;
  uint64_t attempt = 0;
  uint64_t step = 0;
  uint32_t replica = 0;
  server.AddTo(app);
  AddOutputOption(app, output);
  app.require_subcommand(1);
  app.fallthrough();
  CLI::App* list = app.add_subcommand("list", "names of all jobs");
  CLI::App* describe = app.add_subcommand("describe", "one job");
  describe->add_option("NAME", name, "the job's name")->required();
  CLI::App* reg =
      app.add_subcommand("register", "registers a job and confirms its layout");
  reg->add_option("JOB", name,
                  "a setup's name, or a file with a v1.Job as text")
      ->required();
  reg->add_option("--request-id", request_id,
                  "unique for each start of the run")
      ->required();
  std::vector<std::string> samples;
  AddSampleOption(*reg, samples);
  CLI::App* remove = app.add_subcommand("remove", "forgets a job");
  remove->add_option("NAME", name, "the job's name")->required();
  CLI::App* plan = app.add_subcommand("plan", "a step's sealed plan");
  plan->add_option("NAME", name, "the job's name")->required();
  plan->add_option("STEP", step, "the step")
      ->transform(WholeNumber(0, std::numeric_limits<uint64_t>::max()))
      ->required();
  plan->add_option("--attempt", attempt, "default: the latest")
      ->transform(WholeNumber(0, std::numeric_limits<uint64_t>::max()));
  plan->add_option("--replica", replica, "the data-parallel replica")
      ->transform(WholeNumber(0, std::numeric_limits<uint32_t>::max()))
      ->capture_default_str();
  std::string profile_path;
  CLI::App* upload =
      app.add_subcommand("profile", "hands in measured layers of a job");
  upload->add_option("NAME", name, "the job's name")->required();
  upload
      ->add_option("FILE", profile_path, "a v1.Profile as text, plain or gzip")
      ->required();
  if (const auto code = ParseArguments(app, args, io)) return *code;

  absl::StatusOr<client::PlannerClient> client = server.Connect();
  if (!client.ok()) return Report(client.status(), io);
  const Progress progress(absl::StrCat("waiting for ", server.address), io.err);
  if (list->parsed()) return List(*client, output, io);
  if (describe->parsed()) return Describe(*client, name, output, io);
  if (reg->parsed()) {
    return Register(*client, name, request_id, samples, output, io);
  }
  if (upload->parsed()) {
    return UploadProfile(*client, name, profile_path, output, io);
  }
  if (plan->parsed()) {
    v1::PlanKey key;
    key.set_job(name);
    if (attempt == 0) {
      v1::DescribeJobRequest request;
      request.set_job(name);
      const auto job = client->DescribeJob(request);
      if (!job.ok()) return Report(job.status(), io);
      attempt = job->attempt();
    }
    key.set_attempt(attempt);
    key.set_step(step);
    key.set_replica(replica);
    return ShowPlan(*client, key, output, io);
  }
  v1::RemoveJobRequest request;
  request.set_job(name);
  const auto response = client->RemoveJob(request);
  return response.ok() ? kExitOk : Report(response.status(), io);
}

}  // namespace pipeweaver::ctl
