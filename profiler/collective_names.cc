// Which kernels are collectives, told by a table of names.

#include "profiler/collective_names.h"

#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"

namespace pipeweaver::profiler {
namespace {

struct Mark {
  absl::string_view text;
  // What the mark alone says; kOther where the rest of the name tells.
  CollectiveKind kind;
};

constexpr Mark kMarks[] = {
    {"nccl", CollectiveKind::kOther},
    {"rccl", CollectiveKind::kOther},
    {"msccl", CollectiveKind::kOther},
    {"oneccl", CollectiveKind::kOther},
    {"hccl", CollectiveKind::kOther},
    {"nvshmem", CollectiveKind::kOther},
    {"userbuffers", CollectiveKind::kOther},
    {"crossdevicereduce", CollectiveKind::kAllReduce},
    {"oneshotallreduce", CollectiveKind::kAllReduce},
    {"twoshotallreduce", CollectiveKind::kAllReduce},
    {"allreducefusion", CollectiveKind::kAllReduce},
    {"multimem", CollectiveKind::kOther},
    {"deepep::", CollectiveKind::kAllToAll},
};

constexpr Mark kKinds[] = {
    {"allreduce", CollectiveKind::kAllReduce},
    {"allgather", CollectiveKind::kAllGather},
    {"reducescatter", CollectiveKind::kReduceScatter},
    {"alltoall", CollectiveKind::kAllToAll},
    {"sendrecv", CollectiveKind::kSendReceive},
    {"broadcast", CollectiveKind::kBroadcast},
    {"reduce", CollectiveKind::kReduce},
};

}  // namespace

absl::string_view CollectiveKindName(CollectiveKind kind) {
  switch (kind) {
    case CollectiveKind::kNone:
      return "none";
    case CollectiveKind::kAllReduce:
      return "all_reduce";
    case CollectiveKind::kAllGather:
      return "all_gather";
    case CollectiveKind::kReduceScatter:
      return "reduce_scatter";
    case CollectiveKind::kAllToAll:
      return "all_to_all";
    case CollectiveKind::kBroadcast:
      return "broadcast";
    case CollectiveKind::kReduce:
      return "reduce";
    case CollectiveKind::kSendReceive:
      return "send_recv";
    case CollectiveKind::kOther:
      return "other";
  }
  return "none";
}

CollectiveKind CollectiveKindOf(absl::string_view kernel_name) {
  std::string name;
  name.reserve(kernel_name.size());
  for (const char c : kernel_name) {
    if (c != '_' && c != ' ')
      name.push_back(absl::ascii_tolower(static_cast<unsigned char>(c)));
  }
  for (const Mark& mark : kMarks) {
    if (!absl::StrContains(name, mark.text)) continue;
    if (mark.kind != CollectiveKind::kOther) return mark.kind;
    for (const Mark& kind : kKinds) {
      if (absl::StrContains(name, kind.text)) return kind.kind;
    }
    return CollectiveKind::kOther;
  }
  return CollectiveKind::kNone;
}

}  // namespace pipeweaver::profiler
