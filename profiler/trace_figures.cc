// The figures by which an imported trace is compared and checked.

#include "profiler/trace_figures.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace pipeweaver::profiler {
namespace {

using Interval = std::pair<int64_t, int64_t>;

// Length of the union, empty if it leaves int64. Sorts `intervals`.
std::optional<int64_t> UnionLength(std::vector<Interval>& intervals) {
  std::sort(intervals.begin(), intervals.end());
  int64_t length = 0;
  std::optional<int64_t> covered_to;
  for (const auto& [start, end] : intervals) {
    const int64_t from = covered_to ? std::max(start, *covered_to) : start;
    int64_t added = 0;
    if (end > from && (__builtin_sub_overflow(end, from, &added) ||
                       __builtin_add_overflow(length, added, &length))) {
      return std::nullopt;
    }
    covered_to = covered_to ? std::max(end, *covered_to) : end;
  }
  return length;
}

}  // namespace

absl::StatusOr<TraceFigures> ComputeFigures(const ImportedTrace& trace) {
  const absl::Status overflow = absl::OutOfRangeError(
      "the sum of the kernels' times is outside int64 nanoseconds");
  const std::unordered_map<int64_t, int32_t> launches =
      LaunchesByCorrelation(trace);

  TraceFigures figures;
  std::vector<TraceFigures::Kernel> by_name(trace.strings.size());
  std::map<int32_t, std::vector<Interval>> intervals;
  for (const DeviceRecord& record : trace.device_records) {
    if (record.category != TraceCategory::kKernel) continue;
    ++figures.kernels;
    TraceFigures::Kernel& kernel = by_name[record.name];
    ++kernel.count;
    if (__builtin_add_overflow(figures.kernel_total_ns, record.duration_ns,
                               &figures.kernel_total_ns)) {
      return overflow;
    }
    // The other sums are at most the total.
    kernel.total_ns += record.duration_ns;
    intervals[record.device].emplace_back(record.start_ns,
                                          record.start_ns + record.duration_ns);
    const auto launch = launches.find(record.correlation);
    if (record.correlation == kNoId || launch == launches.end() ||
        launch->second < 0) {
      ++figures.unmatched_kernels;
    }
    if (record.collective >= 0) {
      ++figures.collective_kernels;
      figures.collective_total_ns += record.duration_ns;
    }
  }
  for (auto& [device, list] : intervals) {
    const std::optional<int64_t> length = UnionLength(list);
    if (!length ||
        __builtin_add_overflow(figures.busy_ns, *length, &figures.busy_ns))
      return overflow;
  }
  for (int32_t name = 0; name < trace.strings.size(); ++name) {
    TraceFigures::Kernel& kernel = by_name[name];
    if (kernel.count == 0) continue;
    kernel.name = trace.strings.Get(name);
    ++figures.kernel_names;
    if (absl::StrContains(absl::AsciiStrToLower(kernel.name), "nccl")) {
      figures.nccl_kernels += kernel.count;
      figures.nccl_total_ns += kernel.total_ns;
    }
    figures.top10.push_back(std::move(kernel));
  }
  std::sort(figures.top10.begin(), figures.top10.end(),
            [](const TraceFigures::Kernel& a, const TraceFigures::Kernel& b) {
              return a.total_ns != b.total_ns ? a.total_ns > b.total_ns
                                              : a.name < b.name;
            });
  if (figures.top10.size() > 10) figures.top10.resize(10);
  return figures;
}

std::string FiguresJson(const TraceFigures& figures) {
  nlohmann::ordered_json json = {
      {"kernels", figures.kernels},
      {"kernel_names", figures.kernel_names},
      {"kernel_total_ns", figures.kernel_total_ns},
      {"busy_ns", figures.busy_ns},
      {"unmatched_kernels", figures.unmatched_kernels},
      {"nccl_kernels", figures.nccl_kernels},
      {"nccl_total_ns", figures.nccl_total_ns},
      {"collective_kernels", figures.collective_kernels},
      {"collective_total_ns", figures.collective_total_ns},
      {"top10", nlohmann::ordered_json::array()},
  };
  for (const TraceFigures::Kernel& kernel : figures.top10) {
    json["top10"].push_back({kernel.name, kernel.count, kernel.total_ns});
  }
  return absl::StrCat(
      json.dump(2, ' ', false,
                nlohmann::ordered_json::error_handler_t::replace),
      "\n");
}

}  // namespace pipeweaver::profiler
