// What the commands of pipeweaverctl share: exit codes, tables, progress.

#ifndef SERVER_CTL_COMMAND_H_
#define SERVER_CTL_COMMAND_H_

#include <cstdint>
#include <optional>
#include <ostream>
#include <string>
#include <thread>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "nlohmann/json.hpp"
#include "semu/base/mutex.h"

namespace pipeweaver::ctl {

// Exit codes, as `pipeweaverctl help` documents them.
enum ExitCode : int {
  kExitOk = 0,
  // The answer is no (a check failed, bytes differ), or it cannot be written.
  kExitFailed = 1,
  kExitUsage = 2,     // wrong arguments
  kExitBadInput = 3,  // an input breaks a rule, or has no valid schedule
  // The server cannot be reached, did not answer, or asks for a token.
  kExitUnavailable = 4,
};

// The exit code that `status` ends a command with.
ExitCode ExitCodeOf(const absl::Status& status);

// A whole file, plain or gzip, of at most 1 GiB unpacked: a guard against gzip
// bombs. Errors: INVALID_ARGUMENT, a search::FieldError of the path.
absl::StatusOr<std::string> ReadInputFile(const std::string& path);

// Where a command writes: results to `out`, everything else to `err`.
struct CommandIo {
  std::ostream& out;
  std::ostream& err;
};

// Prints `status` as "error: CODE: message" and returns its exit code.
ExitCode Report(const absl::Status& status, const CommandIo& io);

// Parses `args` with `app`. When parsing ends the command (--help, a wrong
// argument) prints why and returns the exit code, else nothing.
std::optional<ExitCode> ParseArguments(CLI::App& app,
                                       absl::Span<const std::string> args,
                                       const CommandIo& io);

// A whole number within bounds, for Option::transform. CLI11 by itself takes -1
// for the largest number and 010 for eight.
CLI::Validator WholeNumber(uint64_t least, uint64_t most);

// Adds `-o json|table` to `app`.
void AddOutputOption(CLI::App& app, std::string& output);

// Rows of equal keys, printed as an aligned table or as a JSON array of
// objects.
class Table {
 public:
  // One cell: a JSON value, and how the table shows it.
  struct Cell {
    nlohmann::ordered_json value;
    std::string text;
  };
  explicit Table(std::vector<std::string> columns);
  // REQUIRES: as many cells as columns.
  void AddRow(std::vector<Cell> row);
  void Print(absl::string_view output, std::ostream& out) const;

  static Cell Text(absl::string_view text);
  static Cell Count(int64_t count);
  static Cell Percent(double ratio);     // 0.125 as "12.5 %"
  static Cell Milliseconds(int64_t ns);  // JSON: nanoseconds
  static Cell Gibibytes(int64_t bytes);  // JSON: bytes

 private:
  std::vector<std::string> columns_;
  std::vector<std::vector<Cell>> rows_;
};

// Says on `err` what goes on once it has lasted a second, and every second
// after.
class Progress {
 public:
  Progress(std::string what, std::ostream& err);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

 private:
  Mutex mutex_;
  CondVar ended_changed_;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

// The commands; `args` are those after the command's name.
int RunSetupsCommand(absl::Span<const std::string> args, const CommandIo& io);
int RunPlanCommand(absl::Span<const std::string> args, const CommandIo& io);
int RunCompareCommand(absl::Span<const std::string> args, const CommandIo& io);
int RunReplayCommand(absl::Span<const std::string> args, const CommandIo& io);
int RunTraceCommand(absl::Span<const std::string> args, const CommandIo& io);
int RunJobCommand(absl::Span<const std::string> args, const CommandIo& io);

}  // namespace pipeweaver::ctl

#endif  // SERVER_CTL_COMMAND_H_
