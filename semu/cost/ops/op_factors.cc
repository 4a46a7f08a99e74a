// Fitted factors of known devices.
//
// Source: fitted by //tests/ops:leave_one_out --print_factors to the H100 and
// A100 (DGX, 80 GB SXM) tables of microsoft/vidur (MIT licence), data/profiling
// at 7d47513363ec447a741ac5e47241580b47724fbf: forward ops of Llama-2-7B,
// Llama-2-70B, Llama-3-8B, Qwen-72B and phi-2 under tensor parallelism 1 to 8,
// and NCCL collectives. Nominal figures: NVIDIA's data sheets.

#include "semu/cost/ops/op_factors.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"

namespace pipeweaver::semu {
namespace {

DeviceFactors H100() {
  return {.name = "h100",
          .sm_count = 132,
          .peak_flops_per_s = 989e12,
          .memory_bytes_per_s = 3.35e12,
          .link_bytes_per_s = 450e9,
          .matmul = {.peak_fraction = 0.8006,
                     .extra_inner = 0,
                     .tile_efficiency = {1, 0.8946, 0.555, 0.6643, 0.6495},
                     .wave_rounding = 0.3435,
                     .sustained_slowdown = 0.1385,
                     .sustained_time_us = 608.5,
                     .bandwidth_fraction = 0.9127,
                     .launch_us = 5.866,
                     .split_cost = 1.111,
                     .attention_output_rate = 0.9548,
                     .ffn_down_rate = 1.047},
          .memory_ops = {{{3.001, 0.1824, 0.203, 17.67e6},
                          {4.855, 0.3484, 0.6926, 35.4e6},
                          {2.396, 0.4672, 0.5506, 54.03e6},
                          {2.623, 0.5918, 0.5643, 27.33e6},
                          {1.542, 1.013, 1.379, 53.84e6}}},
          .collectives = {
              {CollectiveOpKind::kAllReduce, 2, 2, 22.87, 0, 3.218},
              {CollectiveOpKind::kAllReduce, 4, 4, 26.41, 0, 4.194},
              {CollectiveOpKind::kAllReduce, 8, 8, 19.07, 8.577, 3.873},
              {CollectiveOpKind::kSendReceive, 2, 2, 7.189, 0.7193, 2.659},
              {CollectiveOpKind::kSendReceive, 2, 1, 19.11, 0, 27.78}}};
}

DeviceFactors A100() {
  return {.name = "a100",
          .sm_count = 108,
          .peak_flops_per_s = 312e12,
          .memory_bytes_per_s = 2.039e12,
          .link_bytes_per_s = 300e9,
          .matmul = {.peak_fraction = 0.8802,
                     .extra_inner = 97.59,
                     .tile_efficiency = {1, 0.9813, 0.7607, 0.6929, 0.642},
                     .wave_rounding = 0.3432,
                     .sustained_slowdown = 0.179,
                     .sustained_time_us = 248.4,
                     .bandwidth_fraction = 0.7954,
                     .launch_us = 4.553,
                     .split_cost = 1.266,
                     .attention_output_rate = 0.9602,
                     .ffn_down_rate = 1.021},
          .memory_ops = {{{3.278, 0.1397, 0.1551, 115.9e6},
                          {4.661, 0.3378, 0.5659, 28.06e6},
                          {3.003, 0.4149, 0.4866, 26.06e6},
                          {4.242, 0.4919, 0.5816, 24.09e6},
                          {1.808, 0.8706, 1.268, 42.72e6}}},
          .collectives = {
              {CollectiveOpKind::kAllReduce, 2, 2, 42.21, 0.7073, 5.815},
              {CollectiveOpKind::kAllReduce, 4, 4, 13.96, 23.51, 5.596},
              {CollectiveOpKind::kAllReduce, 8, 8, 2.907, 35.62, 6.004},
              // Across nodes that system had a slow network.
              {CollectiveOpKind::kAllReduce, 2, 1, 78.19, 0, 168.3},
              {CollectiveOpKind::kAllReduce, 4, 2, 28.68, 0, 235.6},
              {CollectiveOpKind::kAllReduce, 8, 4, 281.6, 0, 77.24},
              {CollectiveOpKind::kAllReduce, 16, 8, 0, 573, 26.18}}};
}

// An H100 whose NVLink carries 200 in place of 450 GB/s per direction.
DeviceFactors H800() {
  DeviceFactors device = H100();
  device.name = "h800";
  device.link_bytes_per_s = 200e9;
  for (CollectiveFactors& factors : device.collectives) {
    if (factors.devices_per_node >= factors.workers)
      factors.us_per_mb *= 450.0 / 200.0;
  }
  return device;
}

// The same SM as an H100's at lower tensor-core rate, and fewer of them.
DeviceFactors H20() {
  DeviceFactors device = H100();
  device.name = "h20";
  device.sm_count = 78;
  device.peak_flops_per_s = 148e12;
  device.memory_bytes_per_s = 4.0e12;
  return device;
}

const std::vector<DeviceFactors>& AllDevices() {
  static const auto& devices =
      *new std::vector<DeviceFactors>{A100(), H100(), H20(), H800()};
  return devices;
}

}  // namespace

const DeviceFactors* FindDeviceFactors(absl::string_view name) {
  while (!name.empty()) {
    const auto end = std::find_if_not(name.begin(), name.end(), [](char c) {
      return absl::ascii_isalnum(static_cast<unsigned char>(c));
    });
    const auto length = static_cast<std::size_t>(end - name.begin());
    const absl::string_view word = name.substr(0, length);
    for (const DeviceFactors& device : AllDevices()) {
      if (absl::EqualsIgnoreCase(word, device.name)) return &device;
    }
    name.remove_prefix(std::min(length + 1, name.size()));
  }
  return nullptr;
}

std::vector<std::string> KnownDevices() {
  std::vector<std::string> names;
  for (const DeviceFactors& device : AllDevices()) names.push_back(device.name);
  std::sort(names.begin(), names.end());
  return names;
}

}  // namespace pipeweaver::semu
