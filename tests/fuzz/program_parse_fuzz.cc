// Serialised programs as the planner's own tools read them: any bytes are
// refused with a reason or are a program of rows in range.

#include <cstdint>

#include "absl/strings/string_view.h"
#include "search/lower/program_proto.h"
#include "semu/base/check.h"
#include "semu/base/limits.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto program = pipeweaver::search::ParseProgram(
      absl::string_view(reinterpret_cast<const char*>(data), size));
  if (!program.ok()) {
    PW_CHECK(!program.status().message().empty());
    return 0;
  }
  PW_CHECK(program->rank >= 0 && program->rank < program->num_ranks);
  for (const pipeweaver::search::ProgramRow& row : program->rows) {
    PW_CHECK(row.module < pipeweaver::semu::kMaxModules);
    PW_CHECK(row.microbatch < pipeweaver::semu::kMaxMicrobatches);
    PW_CHECK(row.start_ns >= 0 && row.start_ns <= row.end_ns);
  }
  return 0;
}
