// Jobs and batches as the commands name them: a built-in set-up or a file.

#ifndef SERVER_CTL_PLANNING_INPUT_H_
#define SERVER_CTL_PLANNING_INPUT_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "google/protobuf/message.h"
#include "google/protobuf/repeated_field.h"
#include "pipeweaver/v1/batch.pb.h"
#include "pipeweaver/v1/job.pb.h"
#include "pipeweaver/v1/profile.pb.h"
#include "search/planner.h"
#include "semu/model/batch.h"
#include "server/ctl/search_flags.h"

namespace pipeweaver::ctl {

// Reads a message as protobuf text, plain or gzip. Errors: NOT_FOUND,
// INVALID_ARGUMENT naming file, line and what is wrong.
absl::Status ReadTextProto(const std::string& path,
                           google::protobuf::Message& message);

// Writes a message as protobuf text. Errors: PERMISSION_DENIED.
absl::Status WriteTextProto(const std::string& path,
                            const google::protobuf::Message& message);

// Writes a file. Errors: PERMISSION_DENIED.
absl::Status WriteFile(const std::string& path, const std::string& content);

// The job that `name` stands for: a built-in set-up, else a file.
absl::StatusOr<v1::Job> ReadJob(const std::string& name);

// Adds --sample-batch, files for whose batches a layout is proposed.
void AddSampleOption(CLI::App& app, std::vector<std::string>& paths);

// Reads what AddSampleOption named, as ReadTextProto does.
absl::Status ReadSamples(
    const std::vector<std::string>& paths,
    google::protobuf::RepeatedPtrField<v1::BatchMetadata>* samples);

// The arguments that plan, compare and trace have in common.
struct PlanningArguments {
  std::string job;           // a set-up or a file
  std::string batch_file;    // empty: a sample batch
  int microbatches = 64;     // of a sample batch
  std::string profile_file;  // empty: no measured layers
  std::vector<std::string> sample_files;
  SearchFlags search;  // its seed is the sample batch's too

  void AddTo(CLI::App& app);
};

// The name of a strategy or a baseline, for Option::check.
CLI::Validator PlanStrategy();

// A job made ready, and a batch of it.
struct PlanningInput {
  v1::Job job_proto;  // with the layout
  v1::BatchMetadata batch_proto;
  std::optional<v1::Profile> profile;
  std::shared_ptr<const search::PlannableJob> job;
  semu::Batch batch;
};

// How to prepare `job`, where layers of it were measured.
search::PrepareOptions MeasuredBy(const v1::Profile& profile,
                                  const semu::Job& job,
                                  const search::StepPlanner& planner);

absl::StatusOr<PlanningInput> ReadPlanningInput(
    const PlanningArguments& arguments, const search::StepPlanner& planner);

}  // namespace pipeweaver::ctl

#endif  // SERVER_CTL_PLANNING_INPUT_H_
