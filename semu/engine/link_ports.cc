#include "semu/engine/link_ports.h"

#include <algorithm>

namespace pipeweaver::semu {

LinkPorts::LinkPorts(int ranks, const std::vector<StepTransfer>& transfers)
    : transfers_(transfers),
      previous_(transfers.size(), -1),
      ended_(transfers.size(), 0),
      out_busy_(ranks, 0),
      in_busy_(ranks, 0) {
  std::vector<int> last(static_cast<size_t>(ranks) * ranks, -1);
  for (size_t t = 0; t < transfers.size(); ++t) {
    const auto [low, high] =
        std::minmax(transfers[t].from_rank, transfers[t].to_rank);
    int& channel = last[static_cast<size_t>(low) * ranks + high];
    previous_[t] = channel;
    channel = static_cast<int>(t);
  }
}

void LinkPorts::Start(int64_t now_ns, int transfer) {
  waiting_.push_back({now_ns, transfer});
  for (size_t i = waiting_.size() - 1;
       i > 0 && waiting_[i - 1].since_ns == now_ns &&
       waiting_[i - 1].transfer > transfer;
       --i) {
    std::swap(waiting_[i], waiting_[i - 1]);
  }
  changed_ = true;
}

int64_t LinkPorts::NextEventNs(int64_t now_ns) {
  if (changed_) {
    changed_ = false;
    size_t kept = 0;
    for (const Waiting& w : waiting_) {
      const StepTransfer& x = transfers_[w.transfer];
      const int previous = previous_[w.transfer];
      if (out_busy_[x.from_rank] || in_busy_[x.to_rank] ||
          (previous >= 0 && !ended_[previous])) {
        waiting_[kept++] = w;
        continue;
      }
      const int64_t free_ns = now_ns + x.occupancy_ns;
      out_busy_[x.from_rank] = in_busy_[x.to_rank] = 1;
      port_frees_.Push(free_ns, w.transfer);
      ends_.Push(free_ns + x.latency_ns, w.transfer);
    }
    waiting_.resize(kept);
  }
  return std::min(port_frees_.NextNs(), ends_.NextNs());
}

void LinkPorts::AdvanceTo(int64_t now_ns, std::vector<int>* ended) {
  while (port_frees_.NextNs() <= now_ns) {
    const StepTransfer& x = transfers_[port_frees_.Pop()];
    out_busy_[x.from_rank] = in_busy_[x.to_rank] = 0;
    changed_ = true;
  }
  while (ends_.NextNs() <= now_ns) {
    const int transfer = ends_.Pop();
    ended_[transfer] = 1;
    ended->push_back(transfer);
    changed_ = true;
  }
}

}  // namespace pipeweaver::semu
