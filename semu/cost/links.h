// Which link joins two ranks, and how long a transfer over it takes.

#ifndef SEMU_COST_LINKS_H_
#define SEMU_COST_LINKS_H_

#include <cstdint>

#include "semu/model/job.h"

namespace pipeweaver::semu {

// The link between two ranks. Ranks stand on GPUs in Megatron's order: tensor
// parallel fastest, then context, then data, then pipeline; so ranks r and s
// share a node if their first replicas' GPUs do.
const Link& P2pLink(const Parallelism& parallelism, const Links& links,
                    int from_rank, int to_rank);

// Latency and bytes over bandwidth, rounded up. `bytes` per GPU, 0 .. 10^15.
int64_t TransferNs(const Link& link, int64_t bytes);

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_LINKS_H_
