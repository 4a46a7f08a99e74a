// pipeweaverctl setups: the built-in jobs.

#include <filesystem>
#include <limits>
#include <string>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "semu/base/status_macros.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"
#include "server/ctl/command.h"
#include "server/ctl/planning_input.h"

namespace pipeweaver::ctl {
namespace {

int List(absl::string_view output, const CommandIo& io) {
  Table table({"setup", "modules", "tp", "pp", "dp", "device"});
  for (const std::string& name : semu::SetupNames()) {
    const absl::StatusOr<v1::Job> job = semu::MakeSetup(name);
    if (!job.ok()) return Report(job.status(), io);
    const std::string modules = absl::StrJoin(
        job->modules(), " + ", [](std::string* out, const v1::Module& module) {
          absl::StrAppend(out, module.name(),
                          module.frozen() ? " (frozen)" : "");
        });
    const v1::Parallelism& parallelism = job->parallelism();
    table.AddRow({Table::Text(name), Table::Text(modules),
                  Table::Count(parallelism.tensor_parallel()),
                  Table::Count(parallelism.pipeline_parallel()),
                  Table::Count(parallelism.data_parallel()),
                  Table::Text(job->device().name())});
  }
  table.Print(output, io.out);
  return kExitOk;
}

absl::Status Write(const std::string& name, const std::string& folder,
                   int steps, semu::SampleOptions sample) {
  PW_ASSIGN_OR_RETURN(const v1::Job job, semu::MakeSetup(name));
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) {
    return absl::PermissionDeniedError(
        absl::StrCat(folder, ": cannot be made: ", error.message()));
  }
  PW_RETURN_IF_ERROR(
      WriteTextProto(absl::StrCat(folder, "/job.textproto"), job));
  for (int step = 0; step < steps; ++step, ++sample.seed) {
    PW_ASSIGN_OR_RETURN(const v1::BatchMetadata batch,
                        semu::SampleBatch(job, sample));
    PW_RETURN_IF_ERROR(WriteTextProto(
        absl::StrFormat("%s/batch-%03d.textproto", folder, step), batch));
  }
  return absl::OkStatus();
}

}  // namespace

int RunSetupsCommand(absl::Span<const std::string> args, const CommandIo& io) {
  CLI::App app("Lists the built-in jobs, or writes one with sample batches.",
               "pipeweaverctl setups");
  std::string name;
  std::string folder;
  std::string output = "table";
  int steps = 1;
  semu::SampleOptions sample;
  CLI::Option* name_option =
      app.add_option("NAME", name, "the set-up to write; default: list all");
  app.add_option("--out", folder,
                 "folder for job.textproto and batch-000.textproto and so on")
      ->needs(name_option);
  app.add_option("--steps", steps, "batches to write")
      ->transform(WholeNumber(1, 1000))
      ->capture_default_str();
  app.add_option("--microbatches", sample.microbatches, "of each batch")
      ->transform(WholeNumber(1, 4096))
      ->capture_default_str();
  app.add_option("--seed", sample.seed, "of the first batch; then counted up")
      ->transform(WholeNumber(0, std::numeric_limits<uint64_t>::max()))
      ->capture_default_str();
  AddOutputOption(app, output);
  if (const auto code = ParseArguments(app, args, io)) return *code;
  if (name.empty()) return List(output, io);
  if (folder.empty()) {
    io.err << "error: --out: missing, names the folder to write to\n";
    return kExitUsage;
  }
  const absl::Status status = Write(name, folder, steps, sample);
  return status.ok() ? kExitOk : Report(status, io);
}

}  // namespace pipeweaver::ctl
