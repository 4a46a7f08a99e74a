// Tells a collective's transfer from the waiting for its peers: all ranks leave
// together, so the rank that entered last, whose kernel is the shortest, waited
// for nobody.

#ifndef PROFILER_COLLECTIVE_WAITING_H_
#define PROFILER_COLLECTIVE_WAITING_H_

#include <cstdint>
#include <vector>

#include "profiler/trace_import.h"

namespace pipeweaver::profiler {

// One kernel of a collective.
struct CollectiveTime {
  // Index of its trace, and into that trace's device_records.
  int32_t trace = 0;
  int32_t record = 0;
  // The part that is transfer: the minimum over the ranks seen.
  int64_t transfer_ns = 0;
  // The rest.
  int64_t waiting_ns = 0;
  // Not all ranks of the group were seen: the transfer may hold waiting.
  bool includes_waiting = true;
};

// Times of all collective kernels of `traces`, one trace a rank of the same run
// and period; ordered by trace and record. The n-th kernel of a process group,
// kind and kernel name on one rank is the n-th on the others. Where ranks saw
// unequal numbers of them, only one rank is there, one is there twice, or more
// are there than the group has (several groups that the traces do not name),
// nothing is matched and waiting stays in. The group is as large as the call
// says, or else the run; where neither is known, those seen are all.
// Point-to-point kernels (send_recv) are matched like the rest: in all-to-all
// and pipelines both ends are in the same call.
std::vector<CollectiveTime> SeparateWaiting(
    const std::vector<const ImportedTrace*>& traces);

}  // namespace pipeweaver::profiler

#endif  // PROFILER_COLLECTIVE_WAITING_H_
