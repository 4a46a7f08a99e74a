// Placement arithmetic.

#include "semu/cost/links.h"

#include <algorithm>
#include <cmath>

namespace pipeweaver::semu {

const Link& P2pLink(const Parallelism& parallelism, const Links& links,
                    int from_rank, int to_rank) {
  const int64_t gpus_between_ranks = int64_t{parallelism.tensor_parallel} *
                                     parallelism.context_parallel *
                                     parallelism.data_parallel;
  const auto node = [&](int rank) {
    return rank * gpus_between_ranks / links.gpus_per_node;
  };
  return node(from_rank) == node(to_rank) ? links.p2p_intra_node
                                          : links.p2p_inter_node;
}

int64_t TransferNs(const Link& link, int64_t bytes) {
  const double ns = static_cast<double>(bytes) * 1e9 /
                    static_cast<double>(link.bandwidth_bytes_per_second);
  return link.latency_ns + static_cast<int64_t>(std::ceil(std::min(ns, 1e15)));
}

}  // namespace pipeweaver::semu
