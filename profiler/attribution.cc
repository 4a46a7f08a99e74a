// Which operator and which annotation of the host each piece of device work
// belongs to.

#include "profiler/attribution.h"

#include <algorithm>
#include <map>
#include <unordered_map>
#include <utility>

namespace pipeweaver::profiler {
namespace {

int64_t EndOf(const HostRecord& record) {
  return record.start_ns + record.duration_ns;
}

// Finds the innermost of nested ranges at rising times.
class RangeStack {
 public:
  // `ranges`: indices of host records of one category and thread or process.
  RangeStack(const std::vector<HostRecord>& records,
             std::vector<int32_t> ranges)
      : records_(records), ranges_(std::move(ranges)) {
    // Outer before inner where both start together.
    std::sort(ranges_.begin(), ranges_.end(), [&](int32_t a, int32_t b) {
      if (records_[a].start_ns != records_[b].start_ns) {
        return records_[a].start_ns < records_[b].start_ns;
      }
      if (EndOf(records_[a]) != EndOf(records_[b]))
        return EndOf(records_[a]) > EndOf(records_[b]);
      return a < b;
    });
  }

  // The last range to start that covers `time_ns`. Times must not fall.
  int32_t At(int64_t time_ns) {
    while (next_ < ranges_.size() &&
           records_[ranges_[next_]].start_ns <= time_ns) {
      Leave(records_[ranges_[next_]].start_ns);
      open_.push_back(ranges_[next_++]);
    }
    Leave(time_ns);
    return open_.empty() ? kUnattributed : open_.back();
  }

  // Calls visit(range, parent) for every range: the innermost that holds it
  // whole.
  template <typename Visit>
  void VisitParents(const Visit& visit) {
    for (const int32_t range : ranges_) {
      Leave(records_[range].start_ns);
      // A neighbour that ends where this one starts is still open.
      const auto parent =
          std::find_if(open_.rbegin(), open_.rend(), [&](int32_t candidate) {
            return EndOf(records_[candidate]) >= EndOf(records_[range]);
          });
      visit(range, parent == open_.rend() ? kUnattributed : *parent);
      open_.push_back(range);
    }
    open_.clear();
  }

 private:
  // Ranges nest, so those that have ended lie on top.
  void Leave(int64_t time_ns) {
    while (!open_.empty() && EndOf(records_[open_.back()]) < time_ns)
      open_.pop_back();
  }

  const std::vector<HostRecord>& records_;
  std::vector<int32_t> ranges_;
  std::vector<int32_t> open_;
  std::size_t next_ = 0;
};

using ThreadKey = std::pair<int32_t, int32_t>;

}  // namespace

Attribution Attribute(const ImportedTrace& trace) {
  const std::vector<HostRecord>& hosts = trace.host_records;
  const std::size_t num_launches = trace.launches.size();
  Attribution result;
  result.parent_annotations.assign(hosts.size(), kUnattributed);

  std::map<ThreadKey, std::vector<int32_t>> operators;
  std::map<ThreadKey, std::vector<int32_t>> annotations;
  std::map<int32_t, std::vector<int32_t>> process_annotations;
  std::unordered_map<int64_t, int32_t> operator_by_id;
  std::unordered_map<int64_t, int32_t> annotation_by_id;
  for (std::size_t i = 0; i < hosts.size(); ++i) {
    const HostRecord& host = hosts[i];
    const int32_t index = static_cast<int32_t>(i);
    if (host.category == TraceCategory::kOperator) {
      operators[{host.process, host.thread}].push_back(index);
      if (host.external_id != kNoId)
        operator_by_id.emplace(host.external_id, index);
    } else if (host.category == TraceCategory::kAnnotation) {
      annotations[{host.process, host.thread}].push_back(index);
      process_annotations[host.process].push_back(index);
      if (host.external_id != kNoId)
        annotation_by_id.emplace(host.external_id, index);
    }
  }

  // Launches by thread, in order of time.
  std::map<ThreadKey, std::vector<int32_t>> launches;
  std::unordered_map<int64_t, int32_t> launch_by_correlation;
  for (std::size_t i = 0; i < num_launches; ++i) {
    const LaunchRecord& launch = trace.launches[i];
    launch_by_correlation.emplace(launch.correlation, static_cast<int32_t>(i));
    if (launch.start_ns != kNoId) {
      launches[{launch.process, launch.thread}].push_back(
          static_cast<int32_t>(i));
    }
  }
  std::vector<int32_t> launch_operators(num_launches, kUnattributed);
  std::vector<int32_t> launch_annotations(num_launches, kUnattributed);
  std::map<int32_t, std::vector<int32_t>> left_over;  // by process
  const auto by_time = [&trace](int32_t a, int32_t b) {
    return std::make_pair(trace.launches[a].start_ns, a) <
           std::make_pair(trace.launches[b].start_ns, b);
  };
  for (auto& [thread, list] : launches) {
    std::sort(list.begin(), list.end(), by_time);
    RangeStack operator_stack(hosts, operators[thread]);
    RangeStack annotation_stack(hosts, annotations[thread]);
    for (const int32_t launch : list) {
      const int64_t time_ns = trace.launches[launch].start_ns;
      launch_operators[launch] = operator_stack.At(time_ns);
      launch_annotations[launch] = annotation_stack.At(time_ns);
      if (launch_annotations[launch] == kUnattributed)
        left_over[thread.first].push_back(launch);
    }
  }
  for (auto& [process, list] : left_over) {
    std::sort(list.begin(), list.end(), by_time);
    RangeStack stack(hosts, process_annotations[process]);
    for (const int32_t launch : list) {
      launch_annotations[launch] = stack.At(trace.launches[launch].start_ns);
    }
  }
  for (const auto& [thread, list] : annotations) {
    RangeStack(hosts, list)
        .VisitParents([&result](int32_t range, int32_t parent) {
          result.parent_annotations[range] = parent;
        });
  }

  for (const DeviceRecord& record : trace.device_records) {
    int32_t operator_index = kUnattributed;
    int32_t annotation_index = kUnattributed;
    const auto launch = launch_by_correlation.find(record.correlation);
    if (record.correlation != kNoId && launch != launch_by_correlation.end()) {
      operator_index = launch_operators[launch->second];
      annotation_index = launch_annotations[launch->second];
    }
    const auto take_by_id =
        [&record](const std::unordered_map<int64_t, int32_t>& by_id,
                  int32_t* index) {
          if (*index != kUnattributed || record.external_id == kNoId) return;
          if (const auto found = by_id.find(record.external_id);
              found != by_id.end()) {
            *index = found->second;
          }
        };
    take_by_id(operator_by_id, &operator_index);
    take_by_id(annotation_by_id, &annotation_index);
    result.operators.push_back(operator_index);
    result.annotations.push_back(annotation_index);
  }
  return result;
}

}  // namespace pipeweaver::profiler
