// Which kernels are collectives, told by a table of names.

#ifndef PROFILER_COLLECTIVE_NAMES_H_
#define PROFILER_COLLECTIVE_NAMES_H_

#include "absl/strings/string_view.h"

namespace pipeweaver::profiler {

enum class CollectiveKind {
  kNone,
  kAllReduce,
  kAllGather,
  kReduceScatter,
  kAllToAll,
  kBroadcast,
  kReduce,
  kSendReceive,
  // A communication kernel whose name does not say which.
  kOther,
};

// "all_reduce", ...; "none" for kNone.
absl::string_view CollectiveKindName(CollectiveKind kind);

// The kind of a kernel by its name, in any case; '_' and spaces do not count.
//
// A kernel is a collective if its name holds one of these marks:
// - nccl, rccl, msccl: NCCL, RCCL and MSCCL kernels (ncclDevKernel_*, say);
// - oneccl, hccl: Intel's and Habana's libraries;
// - nvshmem: NVSHMEM's device-side transfers;
// - userbuffers: TransformerEngine's overlapped tensor-parallel transfers;
// - crossdevicereduce: vLLM's and SGLang's own all-reduce;
// - oneshotallreduce, twoshotallreduce, multimem, allreducefusion: PyTorch
//   symmetric memory, TensorRT-LLM, FlashInfer;
// - deepep::: DeepEP's dispatch and combine.
// The kind is the first of these that the name holds: allreduce, allgather,
// reducescatter, alltoall, sendrecv, broadcast, reduce; for crossdevicereduce
// all-reduce, for DeepEP all-to-all.
CollectiveKind CollectiveKindOf(absl::string_view kernel_name);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_COLLECTIVE_NAMES_H_
