// The P2P links: each rank has a port out and a port in, each of which carries
// one transfer at a time; transfers between two ranks run one after another in
// their order, whichever way they go (one in-order channel per pair of ranks,
// as NCCL has on one communicator).

#ifndef SEMU_ENGINE_LINK_PORTS_H_
#define SEMU_ENGINE_LINK_PORTS_H_

#include <cstdint>
#include <vector>

#include "semu/engine/event_heap.h"
#include "semu/engine/resource.h"
#include "semu/engine/step_program.h"

namespace pipeweaver::semu {

// Activities are indices of `transfers`, started once both ends have posted. Of
// those that wait, the one that came first begins first, ties by index; one
// that cannot begin lets later ones pass.
class LinkPorts final : public Resource {
 public:
  // `transfers` must outlive this object.
  LinkPorts(int ranks, const std::vector<StepTransfer>& transfers);

  void Start(int64_t now_ns, int transfer) override;
  int64_t NextEventNs(int64_t now_ns) override;
  void AdvanceTo(int64_t now_ns, std::vector<int>* ended) override;

 private:
  struct Waiting {
    int64_t since_ns = 0;
    int transfer = 0;
  };

  const std::vector<StepTransfer>& transfers_;
  std::vector<int> previous_;   // [transfer]: before it on its channel, or -1
  std::vector<uint8_t> ended_;  // [transfer]
  std::vector<uint8_t> out_busy_;  // [rank]
  std::vector<uint8_t> in_busy_;   // [rank]
  std::vector<Waiting> waiting_;   // by time, then by index
  bool changed_ = false;           // something waiting may begin
  EventHeap port_frees_;
  EventHeap ends_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_ENGINE_LINK_PORTS_H_
