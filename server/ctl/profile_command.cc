// `pipeweaverctl profile ...`: measured costs, from traces and from rules.

#include "server/ctl/profile_command.h"

#include <openssl/sha.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"
#include "profiler/decimal.h"
#include "profiler/profile_builder.h"
#include "profiler/profile_file.h"
#include "profiler/text_source.h"
#include "profiler/trace_figures.h"
#include "profiler/trace_import.h"
#include "semu/base/status_macros.h"
#include "semu/cost/ops/op_table.h"

namespace pipeweaver::server {
namespace {

constexpr char kUsage[] =
    "usage: pipeweaverctl profile import [-o json|text] [--profile=FILE] "
    "[--version=N] "
    "TRACE.json[.gz]...\n"
    "       pipeweaverctl profile predict OPS.csv[.gz]\n";
constexpr std::size_t kMaxTableBytes = std::size_t{1} << 30;

struct ImportOptions {
  bool json = false;
  // Empty: no profile is written.
  std::string profile_path;
  int64_t version = 1;
  std::vector<std::string> traces;
};

// A wrong call, as opposed to bad input.
absl::Status WrongCall(absl::string_view message) {
  return absl::UnimplementedError(message);
}

absl::StatusOr<ImportOptions> ParseImport(
    const std::vector<std::string>& args) {
  ImportOptions options;
  for (std::size_t i = 1; i < args.size(); ++i) {
    absl::string_view value = args[i];
    if (args[i] == "-o" || absl::ConsumePrefix(&value, "--output=")) {
      if (args[i] == "-o")
        value = ++i < args.size() ? absl::string_view(args[i]) : "";
      if (value != "json" && value != "text") {
        return WrongCall(
            absl::StrCat("output '", value, "' must be json or text"));
      }
      options.json = value == "json";
    } else if (absl::ConsumePrefix(&value, "--profile=")) {
      if (value.empty()) return WrongCall("--profile needs a file");
      options.profile_path = std::string(value);
    } else if (absl::ConsumePrefix(&value, "--version=")) {
      if (!absl::SimpleAtoi(value, &options.version) || options.version < 1) {
        return WrongCall(
            absl::StrCat("--version '", value, "' must be an integer from 1"));
      }
    } else if (absl::StartsWith(args[i], "-")) {
      return WrongCall(absl::StrCat("unknown option ", args[i]));
    } else {
      options.traces.push_back(args[i]);
    }
  }
  if (options.traces.empty()) return WrongCall("import needs a trace");
  return options;
}

absl::StatusOr<std::string> Sha256OfFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  SHA256_CTX context;
  SHA256_Init(&context);
  std::vector<char> block(1 << 16);
  while (file) {
    file.read(block.data(), static_cast<std::streamsize>(block.size()));
    SHA256_Update(&context, block.data(),
                  static_cast<std::size_t>(file.gcount()));
  }
  if (!file.eof())
    return absl::UnavailableError(absl::StrCat(path, ": cannot be read"));
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256_Final(reinterpret_cast<unsigned char*>(digest.data()), &context);
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

absl::Status Import(const std::vector<std::string>& args, std::ostream& out,
                    std::ostream& err) {
  PW_ASSIGN_OR_RETURN(const ImportOptions options, ParseImport(args));
  std::vector<profiler::ProfileInput> inputs;
  std::vector<std::string> figures_text;
  for (const std::string& path : options.traces) {
    profiler::ProfileInput input;
    PW_ASSIGN_OR_RETURN(input.trace, profiler::ImportTraceFile(path));
    if (input.trace.unusable_device_records > 0) {
      err << path << ": " << input.trace.unusable_device_records
          << " device records left out, the first: "
          << input.trace.first_unusable << "\n";
    }
    PW_ASSIGN_OR_RETURN(const profiler::TraceFigures figures,
                        profiler::ComputeFigures(input.trace));
    figures_text.push_back(options.json ? profiler::FiguresJson(figures)
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
  if (options.json && figures_text.size() > 1) {
    out << "[\n" << absl::StrJoin(figures_text, ",\n") << "]\n";
  } else {
    out << absl::StrJoin(figures_text, "");
  }
  return absl::OkStatus();
}

absl::Status Predict(const std::vector<std::string>& args, std::ostream& out) {
  if (args.size() != 2 || absl::StartsWith(args[1], "-")) {
    return WrongCall("predict needs one op table");
  }
  PW_ASSIGN_OR_RETURN(const std::string csv,
                      profiler::ReadTextFile(args[1], kMaxTableBytes));
  const absl::StatusOr<std::string> predicted = semu::PredictOpTable(csv);
  if (!predicted.ok()) {
    return absl::Status(
        predicted.status().code(),
        absl::StrCat(args[1], ": ", predicted.status().message()));
  }
  out << *predicted;
  return absl::OkStatus();
}

}  // namespace

int RunProfileCommand(const std::vector<std::string>& args, std::ostream& out,
                      std::ostream& err) {
  absl::Status status = WrongCall("expected import or predict");
  if (!args.empty() && args[0] == "import") status = Import(args, out, err);
  if (!args.empty() && args[0] == "predict") status = Predict(args, out);
  if (status.ok()) return 0;
  err << "pipeweaverctl profile: " << status.message() << "\n";
  if (!absl::IsUnimplemented(status)) return 1;
  err << kUsage;
  return 2;
}

}  // namespace pipeweaver::server
