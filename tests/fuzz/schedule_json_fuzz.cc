// Schedule files of one fixed problem: whatever parses is timed or refused, and
// comes back the same from its own text.

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "search/problem/problem_graph.h"
#include "search/problem/problem_json.h"
#include "search/problem/timing.h"
#include "semu/base/check.h"

namespace {

namespace search = pipeweaver::search;

constexpr char kProblem[] = R"({
  "ranks": 2, "p2p_latency_ns": 5, "split_backward": true,
  "memory_limit_bytes": [100, 100],
  "segments": [
    {"id": "v", "stages": [
      {"rank": 0, "choices": [{"forward_ns": 3, "input_grad_ns": 2,
       "weight_grad_ns": 1, "activation_bytes": 4}]}]},
    {"id": "t", "after": ["v"], "stages": [
      {"rank": 0, "choices": [{"forward_ns": 3, "input_grad_ns": 2,
       "weight_grad_ns": 1, "fused_backward_ns": 2, "activation_bytes": 4}]},
      {"rank": 1, "choices": [{"forward_ns": 3, "input_grad_ns": 2,
       "weight_grad_ns": 0, "activation_bytes": 4}]}]}]})";

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const search::Problem* const problem =
      new search::Problem(*search::ParseProblemJson(kProblem));
  static const search::ProblemGraph* const graph =
      new search::ProblemGraph(search::BuildProblemGraph(*problem));
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto schedule = search::ParseScheduleJson(*problem, text);
  if (!schedule.ok()) {
    PW_CHECK(!schedule.status().message().empty());
    return 0;
  }
  const auto times = search::TimeSchedule(*graph, *schedule);
  if (!times.ok()) return 0;
  const std::string written =
      search::ScheduleToJson(*problem, *schedule, *times, {});
  const auto again = search::ParseScheduleJson(*problem, written);
  PW_CHECK(again.ok());
  PW_CHECK(search::ScheduleToJson(*problem, *again, *times, {}) == written);
  return 0;
}
