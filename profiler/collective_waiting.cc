// Tells a collective's transfer from the waiting for its peers.

#include "profiler/collective_waiting.h"

#include <algorithm>
#include <map>
#include <set>
#include <string>
#include <tuple>

namespace pipeweaver::profiler {
namespace {

// Process group, kind, kernel name.
using SequenceKey = std::tuple<std::string, CollectiveKind, std::string>;

}  // namespace

std::vector<CollectiveTime> SeparateWaiting(
    const std::vector<const ImportedTrace*>& traces) {
  std::vector<CollectiveTime> times;
  // For each sequence, by trace: positions in `times`, in order of start.
  std::map<SequenceKey, std::map<int32_t, std::vector<std::size_t>>> sequences;
  for (std::size_t t = 0; t < traces.size(); ++t) {
    const ImportedTrace& trace = *traces[t];
    for (std::size_t r = 0; r < trace.device_records.size(); ++r) {
      const DeviceRecord& record = trace.device_records[r];
      if (record.collective < 0) continue;
      const CollectiveCall& call = trace.collectives[record.collective];
      const SequenceKey key = {trace.strings.Get(call.process_group), call.kind,
                               trace.strings.Get(record.name)};
      sequences[key][static_cast<int32_t>(t)].push_back(times.size());
      times.push_back({static_cast<int32_t>(t), static_cast<int32_t>(r),
                       record.duration_ns, 0, true});
    }
  }
  for (auto& [key, by_trace] : sequences) {
    for (auto& [trace, positions] : by_trace) {
      const std::vector<DeviceRecord>& records = traces[trace]->device_records;
      std::stable_sort(positions.begin(), positions.end(),
                       [&](std::size_t a, std::size_t b) {
                         return records[times[a].record].start_ns <
                                records[times[b].record].start_ns;
                       });
    }
    const std::size_t count = by_trace.begin()->second.size();
    std::set<int64_t> ranks;
    int64_t group_size = 0;
    bool matched = by_trace.size() >= 2;
    for (const auto& [t, positions] : by_trace) {
      const ImportedTrace& trace = *traces[t];
      matched = matched && positions.size() == count;
      if (trace.metadata.rank.has_value()) {
        matched = ranks.insert(*trace.metadata.rank).second && matched;
      }
      const DeviceRecord& record =
          trace.device_records[times[positions.front()].record];
      const int64_t called = trace.collectives[record.collective].group_size;
      group_size =
          std::max(group_size,
                   called > 0 ? called : trace.metadata.world_size.value_or(0));
    }
    const auto seen = static_cast<int64_t>(by_trace.size());
    if (!matched || (group_size > 0 && seen > group_size)) continue;
    const bool complete = seen >= group_size;
    for (std::size_t n = 0; n < count; ++n) {
      int64_t transfer_ns = INT64_MAX;
      for (const auto& [trace, positions] : by_trace) {
        transfer_ns = std::min(transfer_ns, times[positions[n]].transfer_ns);
      }
      for (const auto& [trace, positions] : by_trace) {
        CollectiveTime& time = times[positions[n]];
        time.waiting_ns = time.transfer_ns - transfer_ns;
        time.transfer_ns = transfer_ns;
        time.includes_waiting = !complete;
      }
    }
  }
  return times;
}

}  // namespace pipeweaver::profiler
