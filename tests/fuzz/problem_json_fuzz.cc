// Problem files: whatever parses must come back the same from its own text.

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "search/problem/problem_json.h"
#include "semu/base/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace search = pipeweaver::search;
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto problem = search::ParseProblemJson(text);
  if (!problem.ok()) {
    PW_CHECK(!problem.status().message().empty());
    return 0;
  }
  const std::string written = search::ProblemToJson(*problem);
  const auto again = search::ParseProblemJson(written);
  PW_CHECK(again.ok());
  PW_CHECK(search::ProblemToJson(*again) == written);
  return 0;
}
