#include "semu/cost/roofline_factors.h"

#include "semu/cost/ops/op_factors.h"

namespace pipeweaver::semu {

RooflineFactors DefaultFactors(absl::string_view device_name) {
  // Matmul and network: with these, forward and backward of one layer of the
  // paper's 37B example on 8 tensor-parallel H800 take 10.5 ms for 8192 tokens
  // of the language model and 6.75 ms for 8 images of the vision encoder (arXiv
  // 2504.14145) within 7 %; measured matmuls of H100 in microsoft/vidur (MIT,
  // data/profiling) reach 0.69 of the peak. Attention: FlashAttention-2 on
  // Hopper, arXiv 2307.08691. Elementwise and launches: usual figures of fused
  // kernels, not fitted.
  RooflineFactors factors;
  factors[static_cast<int>(OpKind::kMatmul)] = {0.65, 0.8, 1, 5000};
  factors[static_cast<int>(OpKind::kAttention)] = {0.40, 0.8, 0.75, 8000};
  factors[static_cast<int>(OpKind::kElementwise)] = {1, 0.8, 1, 4000};
  factors[static_cast<int>(OpKind::kCollective)] = {1, 1, 0.75, 5000};
  factors[static_cast<int>(OpKind::kRingTransfer)] = {1, 1, 0.75, 5000};
  if (FindDeviceFactors(device_name) == FindDeviceFactors("h20")) {
    // Little arithmetic beside its bandwidth: matmuls get nearer to the peak.
    // Assumed, not measured.
    factors[static_cast<int>(OpKind::kMatmul)].flops_efficiency = 0.85;
    factors[static_cast<int>(OpKind::kAttention)].flops_efficiency = 0.70;
  }
  return factors;
}

}  // namespace pipeweaver::semu
