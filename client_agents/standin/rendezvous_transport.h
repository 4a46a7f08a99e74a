// Messages between rank processes with the strictest semantics a trainer's
// transport may have: rendezvous, with one in-order channel for each pair of
// ranks that carries both directions (what NCCL does on one communicator). A
// program that ends under this transport ends under buffered sends, too.

#ifndef CLIENT_AGENTS_STANDIN_RENDEZVOUS_TRANSPORT_H_
#define CLIENT_AGENTS_STANDIN_RENDEZVOUS_TRANSPORT_H_

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace pipeweaver::client {

// One rank's end of the channels. Posting never blocks. The k-th post on a
// channel moves its data once both ranks have made their k-th post there and
// the posts before are done; both must name the same transfer, one as sender.
// Thread-safe.
class RendezvousTransport {
 public:
  // `peer_sockets[r]` is this rank's end of a connected stream socket shared
  // with rank r; -1 for none (itself). Takes ownership of the sockets.
  RendezvousTransport(int rank, std::vector<int> peer_sockets);
  // Ends the channels; what is not done by then is dropped.
  ~RendezvousTransport();

  RendezvousTransport(const RendezvousTransport&) = delete;
  RendezvousTransport& operator=(const RendezvousTransport&) = delete;

  // REQUIRES: `transfer` is not posted yet; 0 <= peer < number of sockets.
  void PostSend(int peer, uint64_t transfer, std::string payload);
  void PostRecv(int peer, uint64_t transfer);

  struct Done {
    std::string payload;  // what was sent; empty for a send
    std::chrono::steady_clock::time_point time;
  };

  // Waits until `transfer` is done and says when it was. Errors:
  // DEADLINE_EXCEEDED; UNAVAILABLE when the peer is gone; FAILED_PRECONDITION
  // when the peer's posts do not match this rank's, naming both;
  // INVALID_ARGUMENT when the transfer was not posted.
  absl::StatusOr<Done> Wait(uint64_t transfer,
                            std::chrono::steady_clock::time_point deadline);

 private:
  // What crosses the socket: a fixed header, then `size` bytes.
  struct Frame {
    enum Kind : uint32_t { kPostedSend, kPostedRecv, kData, kDone };
    uint32_t kind;
    uint32_t size;
    uint64_t transfer;
  };
  struct Post {
    uint64_t transfer;
    bool is_send;
    std::string payload;
  };
  struct Channel {
    int socket = -1;
    std::deque<Post> posts;        // not done, in order; ours
    std::deque<Frame> peer_posts;  // not done, in order; the peer's
    bool data_sent = false;        // of the first post
    std::string outgoing;          // bytes to write
    std::string incoming;          // bytes read, not a whole frame yet
    absl::Status error;            // set: the channel is broken
  };
  struct Transfer {
    int peer = 0;
    std::optional<Done> done;
  };

  void PostLocked(int peer, uint64_t transfer, bool is_send,
                  std::string payload);
  // Matches the first posts of both ranks and sends what is due.
  void AdvanceLocked(Channel& channel);
  void FinishFirstLocked(Channel& channel, std::string payload);
  void HandleFrameLocked(Channel& channel, const Frame& frame,
                         std::string payload);
  void ReadLocked(Channel& channel);
  void WriteLocked(Channel& channel);
  void BreakLocked(Channel& channel, absl::Status error);
  void Wake();
  void Run();

  const int rank_;
  int wake_read_ = -1;
  int wake_write_ = -1;
  std::mutex mutex_;  // guards all below
  std::condition_variable changed_;
  std::vector<Channel> channels_;  // [peer]
  std::map<uint64_t, Transfer> transfers_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace pipeweaver::client

#endif  // CLIENT_AGENTS_STANDIN_RENDEZVOUS_TRANSPORT_H_
