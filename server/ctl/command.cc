#include "server/ctl/command.h"

#include <algorithm>
#include <chrono>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "search/problem/field_error.h"
#include "semu/base/check.h"
#include "semu/base/text_source.h"

namespace pipeweaver::ctl {

ExitCode ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kUnauthenticated:
      return kExitUnavailable;
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kDataLoss:
      return kExitFailed;
    default:
      return kExitBadInput;
  }
}

absl::StatusOr<std::string> ReadInputFile(const std::string& path) {
  absl::StatusOr<std::string> text = ReadTextFile(path, std::size_t{1} << 30);
  if (text.ok()) return text;
  absl::string_view why = text.status().message();
  absl::ConsumePrefix(&why, path + ": ");
  return search::FieldError(
      path, absl::StrCat("not readable (", why, ")"),
      "must be a file, plain or gzip, of at most 1 GiB unpacked");
}

ExitCode Report(const absl::Status& status, const CommandIo& io) {
  io.err << "error: " << absl::StatusCodeToString(status.code()) << ": "
         << status.message() << "\n";
  return ExitCodeOf(status);
}

std::optional<ExitCode> ParseArguments(CLI::App& app,
                                       absl::Span<const std::string> args,
                                       const CommandIo& io) {
  try {
    // CLI11 takes the arguments last first.
    app.parse(std::vector<std::string>(args.rbegin(), args.rend()));
  } catch (const CLI::ParseError& error) {
    return app.exit(error, io.out, io.err) == 0 ? kExitOk : kExitUsage;
  }
  return std::nullopt;
}

CLI::Validator WholeNumber(uint64_t least, uint64_t most) {
  return CLI::Validator(
      [least, most](std::string& text) -> std::string {
        uint64_t value = 0;
        if (!absl::SimpleAtoi(text, &value) || value < least || value > most) {
          return absl::StrCat(text, ": must be a whole number from ", least,
                              " to ", most);
        }
        text = absl::StrCat(value);
        return "";
      },
      absl::StrCat("in [", least, " - ", most, "]"));
}

void AddOutputOption(CLI::App& app, std::string& output) {
  app.add_option("-o,--output", output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
}

Table::Table(std::vector<std::string> columns) : columns_(std::move(columns)) {}

void Table::AddRow(std::vector<Cell> row) {
  PW_CHECK(row.size() == columns_.size());
  rows_.push_back(std::move(row));
}

void Table::Print(absl::string_view output, std::ostream& out) const {
  if (output == "json") {
    nlohmann::ordered_json array = nlohmann::ordered_json::array();
    for (const std::vector<Cell>& row : rows_) {
      nlohmann::ordered_json object = nlohmann::ordered_json::object();
      for (size_t i = 0; i < row.size(); ++i)
        object[columns_[i]] = row[i].value;
      array.push_back(std::move(object));
    }
    out << array.dump() << "\n";
    return;
  }
  // Cells of times say their unit, which is not that of the JSON.
  std::vector<std::string> heads;
  std::vector<size_t> widths;
  for (size_t i = 0; i < columns_.size(); ++i) {
    heads.emplace_back(absl::StripSuffix(columns_[i], "_ns"));
    size_t width = heads[i].size();
    for (const std::vector<Cell>& row : rows_) {
      width = std::max(width, row[i].text.size());
    }
    widths.push_back(width);
  }
  // The last column is left ragged: no line ends in blanks.
  const auto print_line = [&](auto text_of) {
    for (size_t i = 0; i < columns_.size(); ++i) {
      const std::string text = text_of(i);
      out << text;
      if (i + 1 < columns_.size()) {
        out << std::string(widths[i] - text.size() + 2, ' ');
      }
    }
    out << "\n";
  };
  print_line([&](size_t i) { return heads[i]; });
  for (const std::vector<Cell>& row : rows_) {
    print_line([&](size_t i) { return row[i].text; });
  }
}

Table::Cell Table::Text(absl::string_view text) {
  return {std::string(text), std::string(text)};
}

Table::Cell Table::Count(int64_t count) { return {count, absl::StrCat(count)}; }

Table::Cell Table::Percent(double ratio) {
  return {ratio, absl::StrFormat("%.1f %%", ratio * 100)};
}

Table::Cell Table::Milliseconds(int64_t ns) {
  return {ns, absl::StrFormat("%.2f ms", static_cast<double>(ns) * 1e-6)};
}

Table::Cell Table::Gibibytes(int64_t bytes) {
  constexpr double kGibibyte = 1 << 30;
  return {bytes, absl::StrFormat("%.1f GiB", bytes / kGibibyte)};
}

Progress::Progress(std::string what, std::ostream& err)
    : thread_([this, what = std::move(what), &err] {
        using Clock = std::chrono::steady_clock;
        MutexLock lock(&mutex_);
        Clock::time_point next = Clock::now();
        for (int seconds = 1; !ended_; ++seconds) {
          next += std::chrono::seconds(1);
          while (!ended_ && !ended_changed_.WaitUntil(&mutex_, next)) {
          }
          if (!ended_) err << what << " ... " << seconds << " s" << std::endl;
        }
      }) {}

Progress::~Progress() {
  {
    MutexLock lock(&mutex_);
    ended_ = true;
  }
  ended_changed_.NotifyOne();
  thread_.join();
}

}  // namespace pipeweaver::ctl
