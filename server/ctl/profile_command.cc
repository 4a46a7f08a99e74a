// `pipeweaverctl profile ...`: measured costs, from traces and from rules.

#include "server/ctl/profile_command.h"

#include <openssl/evp.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <limits>
#include <memory>
#include <optional>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/status/statusor.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "profiler/decimal.h"
#include "profiler/profile_builder.h"
#include "profiler/profile_file.h"
#include "profiler/trace_figures.h"
#include "profiler/trace_import.h"
#include "semu/base/status_macros.h"
#include "semu/base/text_source.h"
#include "semu/cost/ops/op_table.h"

namespace pipeweaver::ctl {
namespace {

constexpr std::size_t kMaxTableBytes = std::size_t{1} << 30;

struct ImportOptions {
  std::string output = "table";
  // Empty: no profile is written.
  std::string profile_path;
  int64_t version = 1;
  std::vector<std::string> traces;
};

absl::StatusOr<std::string> Sha256OfFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> context(
      EVP_MD_CTX_new(), &EVP_MD_CTX_free);
  EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr);
  std::vector<char> block(1 << 16);
  while (file) {
    file.read(block.data(), static_cast<std::streamsize>(block.size()));
    EVP_DigestUpdate(context.get(), block.data(),
                     static_cast<std::size_t>(file.gcount()));
  }
  if (!file.eof())
    return absl::InvalidArgumentError(absl::StrCat(path, ": cannot be read"));
  std::string digest(32, '\0');
  EVP_DigestFinal_ex(context.get(),
                     reinterpret_cast<unsigned char*>(digest.data()), nullptr);
  return absl::BytesToHexString(digest);
}

std::string FiguresText(const std::string& path,
                        const profiler::TraceFigures& figures) {
  std::string text = absl::StrCat(
      path, "\n  kernels ", figures.kernels, " of ", figures.kernel_names,
      " names, ", profiler::MicrosecondsText(figures.kernel_total_ns),
      " us in all, device busy ", profiler::MicrosecondsText(figures.busy_ns),
      " us, without a launch record ", figures.unmatched_kernels,
      "\n  collectives ", figures.collective_kernels, ", ",
      profiler::MicrosecondsText(figures.collective_total_ns), " us\n");
  for (const profiler::TraceFigures::Kernel& kernel : figures.top10) {
    absl::StrAppend(&text,
                    absl::StrFormat("  %8d %16s us  %s\n", kernel.count,
                                    profiler::MicrosecondsText(kernel.total_ns),
                                    kernel.name.substr(0, 100)));
  }
  return text;
}

absl::Status Import(const ImportOptions& options, const CommandIo& io) {
  const bool json = options.output == "json";
  std::vector<profiler::ProfileInput> inputs;
  std::vector<std::string> figures_text;
  for (const std::string& path : options.traces) {
    profiler::ProfileInput input;
    PW_ASSIGN_OR_RETURN(input.trace, profiler::ImportTraceFile(path));
    if (input.trace.unusable_device_records > 0) {
      io.err << path << ": " << input.trace.unusable_device_records
             << " device records left out, the first: "
             << input.trace.first_unusable << "\n";
    }
    PW_ASSIGN_OR_RETURN(const profiler::TraceFigures figures,
                        profiler::ComputeFigures(input.trace));
    figures_text.push_back(json ? profiler::FiguresJson(figures)
                                : FiguresText(path, figures));
    if (options.profile_path.empty()) continue;
    input.name = std::filesystem::path(path).filename().string();
    PW_ASSIGN_OR_RETURN(input.sha256, Sha256OfFile(path));
    inputs.push_back(std::move(input));
  }
  if (!options.profile_path.empty()) {
    PW_ASSIGN_OR_RETURN(const v1::Profile profile,
                        profiler::BuildProfile(inputs, options.version));
    PW_RETURN_IF_ERROR(
        profiler::WriteProfileFile(profile, options.profile_path));
  }
  if (json && figures_text.size() > 1) {
    io.out << "[\n" << absl::StrJoin(figures_text, ",\n") << "]\n";
  } else {
    io.out << absl::StrJoin(figures_text, "");
  }
  return absl::OkStatus();
}

absl::Status Predict(const std::string& path, const CommandIo& io) {
  PW_ASSIGN_OR_RETURN(const std::string csv,
                      ReadTextFile(path, kMaxTableBytes));
  const absl::StatusOr<std::string> predicted = semu::PredictOpTable(csv);
  if (!predicted.ok()) {
    return absl::Status(predicted.status().code(),
                        absl::StrCat(path, ": ", predicted.status().message()));
  }
  io.out << *predicted;
  return absl::OkStatus();
}

}  // namespace

int RunProfileCommand(absl::Span<const std::string> args, const CommandIo& io) {
  CLI::App app("Measured costs: from traces, and from the op cost rules.",
               "pipeweaverctl profile");
  app.require_subcommand(1);
  ImportOptions options;
  CLI::App* import = app.add_subcommand(
      "import",
      "figures of PyTorch/Kineto traces; their measured points as a profile");
  AddOutputOption(*import, options.output);
  CLI::Option* profile = import->add_option(
      "--profile", options.profile_path,
      "new textproto file for the measured points of all traces, "
      "taken as ranks of one run");
  import
      ->add_option("--profile-version", options.version,
                   "version of that profile")
      ->transform(WholeNumber(1, std::numeric_limits<int64_t>::max()))
      ->needs(profile)
      ->capture_default_str();
  import->add_option("TRACE", options.traces, "trace files, plain or gzip")
      ->required();
  std::string table;
  CLI::App* predict = app.add_subcommand(
      "predict",
      "an op table as CSV, with predicted times in place of measured ones");
  predict->add_option("OPS", table, "op table, plain or gzip")->required();
  if (const std::optional<ExitCode> code = ParseArguments(app, args, io))
    return *code;

  const absl::Status status =
      import->parsed() ? Import(options, io) : Predict(table, io);
  if (status.ok()) return kExitOk;
  // An input that breaks off is a bad input, not a failed check.
  return Report(absl::IsDataLoss(status)
                    ? absl::InvalidArgumentError(status.message())
                    : status,
                io);
}

}  // namespace pipeweaver::ctl
