// The figures by which an imported trace is compared and checked.

#ifndef PROFILER_TRACE_FIGURES_H_
#define PROFILER_TRACE_FIGURES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "profiler/trace_import.h"

namespace pipeweaver::profiler {

struct TraceFigures {
  struct Kernel {
    std::string name;
    int64_t count = 0;
    int64_t total_ns = 0;
  };

  int64_t kernels = 0;
  int64_t kernel_names = 0;
  int64_t kernel_total_ns = 0;
  // Sum over devices of the union of their kernels' intervals.
  int64_t busy_ns = 0;
  // Kernels without a runtime or driver record of the same correlation, or with
  // such records of several processes.
  int64_t unmatched_kernels = 0;
  // The name holds "nccl", in any case.
  int64_t nccl_kernels = 0;
  int64_t nccl_total_ns = 0;
  // By the table of collective_names.h.
  int64_t collective_kernels = 0;
  int64_t collective_total_ns = 0;
  // Longest total first, then by name.
  std::vector<Kernel> top10;
};

// Fails with OUT_OF_RANGE where a sum leaves int64.
absl::StatusOr<TraceFigures> ComputeFigures(const ImportedTrace& trace);

// One JSON object, members in the order of the struct; top10 as
// [[name, count, total_ns], ...]. Ends with a newline.
std::string FiguresJson(const TraceFigures& figures);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_TRACE_FIGURES_H_
