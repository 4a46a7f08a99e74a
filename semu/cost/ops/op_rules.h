// Time of one op from its shape alone, by rules whose few factors are fitted to
// measurements (op_factors.h): they hold for shapes and models never measured.

#ifndef SEMU_COST_OPS_OP_RULES_H_
#define SEMU_COST_OPS_OP_RULES_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "semu/cost/ops/op_factors.h"

namespace pipeweaver::semu {

// Microseconds of a 16-bit matmul, rows x inner times inner x columns (each >=
// 1; rows are tokens):
//   launch + (compute^4 + memory^4)^(1/4),
// compute being the best over the tiles a library chooses from, and over
// splitting the inner dimension 1, 2 or 4 times:
//   waves * 2 * tile_rows * tile_columns * (inner / split + extra_inner)
//         / (SM's rate * tile_efficiency)  +  the cost of the split,
// with tiles = ceil(rows / tile_rows) * ceil(columns / tile_columns) * split
// over the SMs as waves, rounded up in part (partial waves overlap with their
// neighbours, and kernels differ in how well), then slowed by power for long
// kernels; memory is all operands once over the bandwidth reached.
double MatmulUs(const DeviceFactors& device, int64_t rows, int64_t columns,
                int64_t inner, MatmulRole role = MatmulRole::kGeneral);

// What a job says of its device, in place of the nominal figures.
struct DeviceFigures {
  double peak_flops_per_s = 0;
  double memory_bytes_per_s = 0;
};

// The same with a job's own figures.
double MatmulUs(const DeviceFactors& device, const DeviceFigures& figures,
                int64_t rows, int64_t columns, int64_t inner, MatmulRole role);

// Microseconds of a kernel that reads and writes `bytes` (>= 0) in all:
//   launch + bytes / (bandwidth * fraction),
// the fraction passing from the cache's to the memory's as bytes grow past
// cache_bytes: hit share 1 / (1 + (bytes / cache_bytes)^4).
double MemoryOpUs(const DeviceFactors& device, MemoryOpKind kind,
                  int64_t bytes);

// The same with a job's own figures.
double MemoryOpUs(const DeviceFactors& device, const DeviceFigures& figures,
                  MemoryOpKind kind, int64_t bytes);

// Microseconds of a collective of `bytes` (>= 0; the whole tensor, before a
// scatter or after a gather) among `workers` (>= 1) GPUs, `devices_per_node` of
// them in each node. One worker: 0. A pipelined ring transfer in chunks of the
// best length costs latency + bytes / bandwidth + twice the root of their
// product, whence the three terms. Between the fitted worker counts the terms
// are interpolated in log(workers), bandwidth as bus bandwidth (bytes moved per
// GPU over time); beyond them the nearest count's bus bandwidth holds, and
// latency grows with workers across nodes, but not inside one: measured ones of
// 2 to 8 workers are alike. All-gather and reduce-scatter are half an
// all-reduce each, as in a ring, where none is fitted. NOT_FOUND where the
// device has no factors for the kind and reach.
absl::StatusOr<double> CollectiveUs(const DeviceFactors& device,
                                    CollectiveOpKind kind, int workers,
                                    int devices_per_node, int64_t bytes);

// The same inside one node whose links carry `link_bytes_per_s` (> 0) per
// direction: what the nominal link would take for as many more bytes as it
// carries more, latency apart.
absl::StatusOr<double> CollectiveUs(const DeviceFactors& device,
                                    double link_bytes_per_s,
                                    CollectiveOpKind kind, int workers,
                                    int64_t bytes);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OPS_OP_RULES_H_
