// See shape_buckets.h.

#include "semu/model/shape_buckets.h"

#include <cstdint>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::semu {

absl::Status CheckShapeBuckets(const Job& job, const Microbatch& microbatch,
                               int index) {
  if (job.executor.shape_buckets.empty()) return absl::OkStatus();
  const int64_t largest = job.executor.shape_buckets.back();
  for (size_t m = 0; m < job.modules.size(); ++m) {
    if (InheritedEdge(job, static_cast<int>(m)) >= 0) continue;
    const std::vector<int64_t>& tokens = microbatch.item_tokens[m];
    for (size_t i = 0; i < tokens.size(); ++i) {
      if (tokens[i] <= largest) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "microbatches[", index, "] item ", i, " of module \"",
          job.modules[m].name, "\" has ", tokens[i],
          " tokens: must be at most the largest of executor.shape_buckets, ",
          largest));
    }
  }
  return absl::OkStatus();
}

}  // namespace pipeweaver::semu
