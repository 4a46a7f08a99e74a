// Which operator and which annotation of the host each piece of device work
// belongs to.

#include "profiler/attribution.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "profiler/layer_annotation.h"

namespace pipeweaver::profiler {
namespace {

int64_t EndOf(const HostRecord& record) {
  return record.start_ns + record.duration_ns;
}

// By start, outer before inner where both start together.
bool Precedes(const std::vector<HostRecord>& records, int32_t a, int32_t b) {
  return std::make_tuple(records[a].start_ns, EndOf(records[b]), a) <
         std::make_tuple(records[b].start_ns, EndOf(records[a]), b);
}

// Finds the innermost of nested ranges at rising times.
class RangeStack {
 public:
  // `ranges`: indices of host records of one category and thread.
  RangeStack(const std::vector<HostRecord>& records,
             std::vector<int32_t> ranges)
      : records_(records), ranges_(std::move(ranges)) {
    std::sort(ranges_.begin(), ranges_.end(), [this](int32_t a, int32_t b) {
      return Precedes(records_, a, b);
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

  // The last of the ranges before `range` that holds it whole. Asked of ranges
  // in order (Precedes), own or others', and in place of At.
  int32_t HolderOf(int32_t range) {
    while (next_ < ranges_.size() &&
           Precedes(records_, ranges_[next_], range)) {
      Leave(records_[ranges_[next_]].start_ns);
      open_.push_back(ranges_[next_++]);
    }
    Leave(records_[range].start_ns);
    // A neighbour that ends where this one starts is still open.
    const auto holder =
        std::find_if(open_.rbegin(), open_.rend(), [&](int32_t candidate) {
          return EndOf(records_[candidate]) >= EndOf(records_[range]);
        });
    return holder == open_.rend() ? kUnattributed : *holder;
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

// A time on a thread of the host.
struct Moment {
  int32_t process = 0;
  int32_t thread = 0;
  int64_t time_ns = 0;
};

// Indices of host records.
using RangesByThread = std::map<int32_t, std::vector<int32_t>>;

class HostRanges {
 public:
  explicit HostRanges(const ImportedTrace& trace)
      : hosts_(trace.host_records),
        in_layer_(hosts_.size(), false),
        parents_(hosts_.size(), kUnattributed) {
    for (std::size_t i = 0; i < hosts_.size(); ++i) {
      const HostRecord& host = hosts_[i];
      const int32_t index = static_cast<int32_t>(i);
      if (host.category == TraceCategory::kOperator) {
        operators_[host.process][host.thread].push_back(index);
      } else if (host.category == TraceCategory::kAnnotation) {
        annotations_[host.process][host.thread].push_back(index);
      }
    }
    for (auto& [process, by_thread] : annotations_) {
      std::vector<int32_t> roots = NestThreads(trace, &by_thread);
      NestRoots(by_thread, std::move(roots));
    }
  }

  // By host record: the annotation around it, for annotations only.
  const std::vector<int32_t>& parents() const { return parents_; }

  // By moment: the innermost operator of its thread.
  std::vector<int32_t> OperatorsAt(const std::vector<Moment>& moments) const {
    return InnermostAt(operators_, moments, /*any_thread=*/false);
  }

  // By moment: the innermost annotation of its thread, or else of its process.
  std::vector<int32_t> AnnotationsAt(const std::vector<Moment>& moments) const {
    return InnermostAt(annotations_, moments, /*any_thread=*/true);
  }

 private:
  // Sets the parents inside each thread; those that have none there.
  std::vector<int32_t> NestThreads(const ImportedTrace& trace,
                                   RangesByThread* by_thread) {
    std::vector<int32_t> roots;
    for (auto& [thread, ranges] : *by_thread) {
      std::sort(ranges.begin(), ranges.end(), [this](int32_t a, int32_t b) {
        return Precedes(hosts_, a, b);
      });
      RangeStack stack(hosts_, ranges);
      for (const int32_t range : ranges) {
        const int32_t parent = stack.HolderOf(range);
        parents_[range] = parent;
        if (parent == kUnattributed) roots.push_back(range);
        in_layer_[range] =
            (parent != kUnattributed && in_layer_[parent]) ||
            ParseLayerAnnotation(trace.strings.Get(hosts_[range].name))
                .has_value();
      }
    }
    return roots;
  }

  // Gives the outermost ranges of each thread their parents among other
  // threads' ranges. A layer's time is its own thread's or that of threads that
  // work for it: it is no part of another layer's.
  void NestRoots(const RangesByThread& by_thread, std::vector<int32_t> roots) {
    std::sort(roots.begin(), roots.end(),
              [this](int32_t a, int32_t b) { return Precedes(hosts_, a, b); });
    std::map<int32_t, RangeStack> stacks = StacksOf(by_thread);
    std::vector<std::pair<int32_t, int32_t>> found;
    for (const int32_t root : roots) {
      int32_t best = kUnattributed;
      for (auto& [thread, stack] : stacks) {
        if (thread == hosts_[root].thread) continue;
        int32_t holder = stack.HolderOf(root);
        while (in_layer_[root] && holder != kUnattributed && in_layer_[holder])
          holder = parents_[holder];
        best = Better(best, holder);
      }
      found.emplace_back(root, best);
    }
    for (const auto& [root, parent] : found) parents_[root] = parent;
  }

  std::map<int32_t, RangeStack> StacksOf(
      const RangesByThread& by_thread) const {
    std::map<int32_t, RangeStack> stacks;
    for (const auto& [thread, ranges] : by_thread) {
      stacks.emplace(thread, RangeStack(hosts_, ranges));
    }
    return stacks;
  }

  // Of ranges of different threads, or kUnattributed: those in layers before
  // others, then the last.
  int32_t Better(int32_t a, int32_t b) const {
    if (a == kUnattributed || b == kUnattributed) return std::max(a, b);
    if (in_layer_[a] != in_layer_[b]) return in_layer_[a] ? a : b;
    return Precedes(hosts_, a, b) ? b : a;
  }

  std::vector<int32_t> InnermostAt(
      const std::map<int32_t, RangesByThread>& ranges,
      const std::vector<Moment>& moments, bool any_thread) const {
    std::vector<int32_t> result(moments.size(), kUnattributed);
    std::map<int32_t, std::vector<std::size_t>> by_process;
    for (std::size_t i = 0; i < moments.size(); ++i)
      by_process[moments[i].process].push_back(i);
    for (auto& [process, list] : by_process) {
      const auto own = ranges.find(process);
      if (own == ranges.end()) continue;
      std::stable_sort(list.begin(), list.end(),
                       [&moments](std::size_t a, std::size_t b) {
                         return moments[a].time_ns < moments[b].time_ns;
                       });
      std::map<int32_t, RangeStack> stacks = StacksOf(own->second);
      for (const std::size_t i : list) {
        const int64_t time_ns = moments[i].time_ns;
        if (const auto stack = stacks.find(moments[i].thread);
            stack != stacks.end()) {
          result[i] = stack->second.At(time_ns);
        }
        if (result[i] != kUnattributed || !any_thread) continue;
        for (auto& [thread, stack] : stacks) {
          result[i] = Better(result[i], stack.At(time_ns));
        }
      }
    }
    return result;
  }

  const std::vector<HostRecord>& hosts_;
  // By process.
  std::map<int32_t, RangesByThread> operators_;
  std::map<int32_t, RangesByThread> annotations_;
  // By host record: whether it or a range of its thread around it is a layer's.
  std::vector<bool> in_layer_;
  std::vector<int32_t> parents_;
};

// Host records of a category by external id: the first of several;
// kUnattributed where they are of several processes.
std::unordered_map<int64_t, int32_t> ById(const std::vector<HostRecord>& hosts,
                                          TraceCategory category) {
  std::unordered_map<int64_t, int32_t> by_id;
  for (std::size_t i = 0; i < hosts.size(); ++i) {
    if (hosts[i].category != category || hosts[i].external_id == kNoId)
      continue;
    const auto [entry, is_new] =
        by_id.emplace(hosts[i].external_id, static_cast<int32_t>(i));
    if (!is_new && entry->second != kUnattributed &&
        hosts[entry->second].process != hosts[i].process) {
      entry->second = kUnattributed;
    }
  }
  return by_id;
}

int32_t Find(const std::unordered_map<int64_t, int32_t>& by_id, int64_t id) {
  const auto found = id == kNoId ? by_id.end() : by_id.find(id);
  return found == by_id.end() ? kUnattributed : found->second;
}

}  // namespace

Attribution Attribute(const ImportedTrace& trace) {
  const std::vector<HostRecord>& hosts = trace.host_records;
  const HostRanges ranges(trace);
  const std::size_t num_records = trace.device_records.size();
  Attribution result;
  result.operators.assign(num_records, kUnattributed);
  result.annotations.assign(num_records, kUnattributed);
  result.parent_annotations = ranges.parents();

  const std::unordered_map<int64_t, int32_t> launches =
      LaunchesByCorrelation(trace);
  std::vector<Moment> moments;
  std::vector<std::size_t> launched;
  for (std::size_t r = 0; r < num_records; ++r) {
    const int32_t index = Find(launches, trace.device_records[r].correlation);
    if (index < 0) continue;
    const LaunchRecord& launch = trace.launches[index];
    if (launch.start_ns == kNoId) continue;
    launched.push_back(r);
    moments.push_back({launch.process, launch.thread, launch.start_ns});
  }
  const std::vector<int32_t> operators = ranges.OperatorsAt(moments);
  const std::vector<int32_t> annotations = ranges.AnnotationsAt(moments);
  for (std::size_t i = 0; i < launched.size(); ++i) {
    result.operators[launched[i]] = operators[i];
    result.annotations[launched[i]] = annotations[i];
  }

  // By external id what the launch does not tell.
  const std::unordered_map<int64_t, int32_t> operator_by_id =
      ById(hosts, TraceCategory::kOperator);
  const std::unordered_map<int64_t, int32_t> annotation_by_id =
      ById(hosts, TraceCategory::kAnnotation);
  std::vector<Moment> operator_moments;
  std::vector<std::size_t> by_operator;
  for (std::size_t r = 0; r < num_records; ++r) {
    const int64_t id = trace.device_records[r].external_id;
    if (result.operators[r] == kUnattributed) {
      result.operators[r] = Find(operator_by_id, id);
      if (result.operators[r] != kUnattributed &&
          result.annotations[r] == kUnattributed) {
        const HostRecord& host = hosts[result.operators[r]];
        by_operator.push_back(r);
        operator_moments.push_back({host.process, host.thread, host.start_ns});
      }
    }
  }
  const std::vector<int32_t> around = ranges.AnnotationsAt(operator_moments);
  for (std::size_t i = 0; i < by_operator.size(); ++i)
    result.annotations[by_operator[i]] = around[i];
  for (std::size_t r = 0; r < num_records; ++r) {
    if (result.annotations[r] == kUnattributed) {
      result.annotations[r] =
          Find(annotation_by_id, trace.device_records[r].external_id);
    }
  }
  return result;
}

}  // namespace pipeweaver::profiler
