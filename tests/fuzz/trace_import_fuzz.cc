// Traces: whatever imports has figures that hold together and a profile that
// its own reader takes, and block borders change nothing.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "google/protobuf/text_format.h"
#include "profiler/profile_builder.h"
#include "profiler/profile_file.h"
#include "profiler/trace_figures.h"
#include "profiler/trace_import.h"
#include "semu/base/check.h"
#include "semu/base/text_source.h"

namespace profiler = pipeweaver::profiler;

namespace {

absl::StatusOr<profiler::ImportedTrace> Import(const std::string& text,
                                               std::size_t block_bytes) {
  const std::unique_ptr<pipeweaver::TextSource> source =
      pipeweaver::TextFromString(text, block_bytes);
  return profiler::ImportTrace(*source);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  absl::StatusOr<profiler::ImportedTrace> trace = Import(text, 1 << 16);
  const auto bytewise = Import(text, 1);
  PW_CHECK(trace.status() == bytewise.status());
  if (!trace.ok()) {
    PW_CHECK(!trace.status().message().empty());
    return 0;
  }
  const auto figures = profiler::ComputeFigures(*trace);
  const auto again = profiler::ComputeFigures(*bytewise);
  PW_CHECK(figures.ok() == again.ok());
  if (!figures.ok()) return 0;
  PW_CHECK(profiler::FiguresJson(*figures) == profiler::FiguresJson(*again));
  PW_CHECK(figures->busy_ns <= figures->kernel_total_ns);
  PW_CHECK(figures->unmatched_kernels <= figures->kernels);

  std::vector<profiler::ProfileInput> inputs;
  inputs.push_back({*std::move(trace), "fuzz", ""});
  const auto profile = profiler::BuildProfile(inputs, 1);
  if (!profile.ok()) return 0;
  std::string written;
  PW_CHECK(google::protobuf::TextFormat::PrintToString(*profile, &written));
  const auto read = profiler::ParseProfile(written, "fuzz");
  PW_CHECK(read.ok());
  PW_CHECK(read->SerializeAsString() == profile->SerializeAsString());
  return 0;
}
