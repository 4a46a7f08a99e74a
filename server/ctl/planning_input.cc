#include "server/ctl/planning_input.h"

#include <fstream>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/text_format.h"
#include "profiler/profile_file.h"
#include "proto/text/text_proto.h"
#include "semu/base/status_macros.h"
#include "semu/base/text_source.h"
#include "semu/cost/calibration/corrected_costs.h"
#include "semu/cost/measured/profile_layers.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/sample_batches.h"
#include "semu/model/setups.h"
#include "server/ctl/command.h"

namespace pipeweaver::ctl {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{1} << 30;

}  // namespace

absl::Status ReadTextProto(const std::string& path,
                           google::protobuf::Message& message) {
  const absl::StatusOr<std::string> text = ReadTextFile(path, kMaxFileBytes);
  if (!text.ok()) {
    return absl::IsNotFound(text.status())
               ? text.status()
               : absl::InvalidArgumentError(text.status().message());
  }
  return ParseTextProto(*text, path, message);
}

absl::Status WriteTextProto(const std::string& path,
                            const google::protobuf::Message& message) {
  google::protobuf::TextFormat::Printer printer;
  printer.SetUseShortRepeatedPrimitives(true);
  std::string text;
  printer.PrintToString(message, &text);
  return WriteFile(path, text);
}

absl::Status WriteFile(const std::string& path, const std::string& content) {
  std::ofstream out(path, std::ios::binary);
  out << content;
  out.close();
  if (!out) {
    return absl::DataLossError(absl::StrCat(path, ": cannot be written"));
  }
  return absl::OkStatus();
}

absl::StatusOr<v1::Job> ReadJob(const std::string& name) {
  absl::StatusOr<v1::Job> setup = semu::MakeSetup(name);
  if (setup.ok() || !absl::IsNotFound(setup.status())) return setup;
  v1::Job job;
  const absl::Status status = ReadTextProto(name, job);
  if (absl::IsNotFound(status)) {
    return absl::NotFoundError(absl::StrCat(
        name,
        ": neither a set-up (`pipeweaverctl setups` lists them) nor a "
        "readable file"));
  }
  if (!status.ok()) return status;
  return job;
}

void AddSampleOption(CLI::App& app, std::vector<std::string>& paths) {
  app.add_option(
      "--sample-batch", paths,
      "batches such as the job will have, on which a layout is "
      "chosen where none is pinned: files with a v1.BatchMetadata as "
      "text; default: batches made up from the job's limits");
}

absl::Status ReadSamples(
    const std::vector<std::string>& paths,
    google::protobuf::RepeatedPtrField<v1::BatchMetadata>* samples) {
  for (const std::string& path : paths) {
    PW_RETURN_IF_ERROR(ReadTextProto(path, *samples->Add()));
  }
  return absl::OkStatus();
}

void PlanningArguments::AddTo(CLI::App& app) {
  app.add_option("JOB", job, "a set-up's name, or a file with a v1.Job as text")
      ->required();
  CLI::Option* batch = app.add_option(
      "BATCH", batch_file,
      "a file with a v1.BatchMetadata as text; default: a sample");
  app.add_option("--microbatches", microbatches, "of the sample batch")
      ->transform(WholeNumber(1, 4096))
      ->excludes(batch)
      ->capture_default_str();
  app.add_option(
      "--profile", profile_file,
      "measured layers of the job: a file with a v1.Profile as text");
  AddSampleOption(app, sample_files);
  search.AddTo(app);
}

CLI::Validator PlanStrategy() {
  return CLI::IsMember(search::MakeStepPlanner()->StrategyNames());
}

search::PrepareOptions MeasuredBy(const v1::Profile& profile,
                                  const semu::Job& job,
                                  const search::StepPlanner& planner) {
  search::PrepareOptions options;
  options.costs = std::make_shared<semu::CorrectedCosts>(
      planner.Costs(), semu::MeasuredLayersOf(profile, job),
      semu::Calibration());
  return options;
}

absl::StatusOr<PlanningInput> ReadPlanningInput(
    const PlanningArguments& arguments, const search::StepPlanner& planner) {
  PlanningInput input;
  PW_ASSIGN_OR_RETURN(input.job_proto, ReadJob(arguments.job));
  PW_ASSIGN_OR_RETURN(const semu::Job job, semu::JobFromProto(input.job_proto));
  std::optional<semu::Layout> pinned;
  if (input.job_proto.has_layout()) {
    PW_ASSIGN_OR_RETURN(pinned,
                        semu::LayoutFromProto(input.job_proto.layout(), job));
  }
  search::PrepareOptions options;
  if (!arguments.profile_file.empty()) {
    PW_ASSIGN_OR_RETURN(input.profile,
                        profiler::ReadProfileFile(arguments.profile_file));
    options = MeasuredBy(*input.profile, job, planner);
  }
  google::protobuf::RepeatedPtrField<v1::BatchMetadata> sample_protos;
  PW_RETURN_IF_ERROR(ReadSamples(arguments.sample_files, &sample_protos));
  PW_ASSIGN_OR_RETURN(const std::vector<semu::Batch> samples,
                      semu::SampleBatchesFromProto(sample_protos, job));
  options.samples = samples;
  options.threads = arguments.search.threads;
  PW_ASSIGN_OR_RETURN(input.job, planner.Prepare(job, pinned, options));
  *input.job_proto.mutable_layout() =
      semu::LayoutToProto(input.job->layout, job);
  if (arguments.batch_file.empty()) {
    semu::SampleOptions sample;
    sample.microbatches = arguments.microbatches;
    sample.seed = arguments.search.seed;
    PW_ASSIGN_OR_RETURN(input.batch_proto,
                        semu::SampleBatch(input.job_proto, sample));
  } else {
    PW_RETURN_IF_ERROR(ReadTextProto(arguments.batch_file, input.batch_proto));
  }
  PW_ASSIGN_OR_RETURN(input.batch,
                      semu::BatchFromProto(input.batch_proto, job));
  return input;
}

}  // namespace pipeweaver::ctl
