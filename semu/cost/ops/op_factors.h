// What the op cost rules know about a device: its nominal figures and the
// efficiency factors fitted to measurements on it.

#ifndef SEMU_COST_OPS_OP_FACTORS_H_
#define SEMU_COST_OPS_OP_FACTORS_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace pipeweaver::semu {

// What a matmul is for. Rates differ by it at equal shape: the inputs' values
// set how much power the tensor cores draw, and so the clock.
enum class MatmulRole {
  kGeneral,  // query/key/value and up projections, heads, embeddings of patches
  kAttentionOutput,
  kFfnDown,
};

// Sizes of the part of the output that one SM computes at a time.
struct Tile {
  int64_t rows = 0;
  int64_t columns = 0;
  // Index into MatmulFactors::tile_efficiency.
  int size_class = 0;
};
inline constexpr int kNumTileClasses = 5;
inline constexpr std::array<Tile, 8> kTiles = {{{128, 256, 0},
                                                {256, 128, 0},
                                                {128, 128, 1},
                                                {128, 64, 2},
                                                {64, 128, 2},
                                                {64, 64, 3},
                                                {64, 256, 4},
                                                {256, 64, 4}}};

// Factors of MatmulNs (op_rules.h), which says how they act.
struct MatmulFactors {
  // Share of the peak FLOP/s that a full wave of the largest tiles reaches.
  double peak_fraction = 0;
  // What a tile's prologue and epilogue cost, as additional inner dimension.
  double extra_inner = 0;
  // Relative to the class of the largest tiles, whose entry is 1.
  std::array<double, kNumTileClasses> tile_efficiency = {};
  // 0: a partial wave costs its share; 1: it costs a whole one.
  double wave_rounding = 0;
  // Long kernels draw more power and run slower by up to this share, reached
  // over this time.
  double sustained_slowdown = 0;
  double sustained_time_us = 1;
  // Share of the memory bandwidth reached.
  double bandwidth_fraction = 0;
  double launch_us = 0;
  // Writing and summing the partial results of a split inner dimension, as a
  // multiple of their bytes over the bandwidth.
  double split_cost = 0;
  // Rates by role, relative to kGeneral.
  double attention_output_rate = 1;
  double ffn_down_rate = 1;
};

// Kernels bound by memory.
enum class MemoryOpKind {
  kEmbedding,
  kNorm,
  kRotary,
  kActivation,
  kAdd,
};
inline constexpr int kNumMemoryOpKinds = 5;

// Factors of MemoryOpNs (op_rules.h).
struct MemoryOpFactors {
  double launch_us = 0;
  // Shares of the memory bandwidth that bytes reach in memory and in the
  // second-level cache (which may exceed 1).
  double memory_fraction = 0;
  double cache_fraction = 0;
  // At this many bytes half of them are found in the cache.
  double cache_bytes = 1;
};

enum class CollectiveOpKind {
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kSendReceive,
};

// Time of a collective = latency_us + root_us * sqrt(MB) + us_per_mb * MB, of a
// pipelined transfer whose chunks are as long as best (op_rules.h).
struct CollectiveFactors {
  CollectiveOpKind kind = CollectiveOpKind::kAllReduce;
  int workers = 2;
  // Workers of one node; fewer than `workers`: the collective crosses nodes.
  int devices_per_node = 2;
  double latency_us = 0;
  double root_us = 0;
  double us_per_mb = 0;
};

struct DeviceFactors {
  // In lower case, as in op tables: "h100".
  std::string name;
  int64_t sm_count = 0;
  // Dense, 16 bit.
  double peak_flops_per_s = 0;
  double memory_bytes_per_s = 0;
  // Between GPUs of a node, per direction.
  double link_bytes_per_s = 0;
  MatmulFactors matmul;
  std::array<MemoryOpFactors, kNumMemoryOpKinds> memory_ops;
  // Ordered by kind, crossing nodes or not, workers.
  std::vector<CollectiveFactors> collectives;
};

// The devices with fitted factors, and devices of the same architecture with
// their own nominal figures and the relative's factors: h100, a100, h800, h20.
// The name may be the device's own, "NVIDIA H100 80GB HBM3": one of its words,
// parted by anything but letters and digits, must be a known one. Null for any
// other name. Case does not count.
const DeviceFactors* FindDeviceFactors(absl::string_view name);

// Names FindDeviceFactors knows, sorted.
std::vector<std::string> KnownDevices();

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OPS_OP_FACTORS_H_
