#include "client_agents/standin/rendezvous_transport.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pipeweaver::client {
namespace {

// A frame larger than this is not ours.
constexpr uint32_t kMaxPayloadBytes = 1 << 20;

const char* Direction(bool is_send) { return is_send ? "a send" : "a receive"; }

}  // namespace

RendezvousTransport::RendezvousTransport(int rank,
                                         std::vector<int> peer_sockets)
    : rank_(rank), channels_(peer_sockets.size()) {
  for (size_t peer = 0; peer < peer_sockets.size(); ++peer) {
    channels_[peer].socket = peer_sockets[peer];
    if (peer_sockets[peer] >= 0) {
      fcntl(peer_sockets[peer], F_SETFL, O_NONBLOCK);
    }
  }
  int ends[2];
  if (pipe2(ends, O_NONBLOCK | O_CLOEXEC) == 0) {
    wake_read_ = ends[0];
    wake_write_ = ends[1];
  }
  thread_ = std::thread([this] { Run(); });
}

RendezvousTransport::~RendezvousTransport() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  Wake();
  thread_.join();
  for (const Channel& channel : channels_) {
    if (channel.socket >= 0) close(channel.socket);
  }
  close(wake_read_);
  close(wake_write_);
}

void RendezvousTransport::PostSend(int peer, uint64_t transfer,
                                   std::string payload) {
  std::lock_guard<std::mutex> lock(mutex_);
  PostLocked(peer, transfer, /*is_send=*/true, std::move(payload));
}

void RendezvousTransport::PostRecv(int peer, uint64_t transfer) {
  std::lock_guard<std::mutex> lock(mutex_);
  PostLocked(peer, transfer, /*is_send=*/false, "");
}

void RendezvousTransport::PostLocked(int peer, uint64_t transfer, bool is_send,
                                     std::string payload) {
  Channel& channel = channels_[peer];
  transfers_[transfer].peer = peer;
  channel.posts.push_back({transfer, is_send, std::move(payload)});
  const Frame frame = {is_send ? Frame::kPostedSend : Frame::kPostedRecv, 0,
                       transfer};
  channel.outgoing.append(reinterpret_cast<const char*>(&frame), sizeof(frame));
  // First of all: the peer must hear of a post that does not match its own,
  // too.
  WriteLocked(channel);
  AdvanceLocked(channel);
  WriteLocked(channel);
}

void RendezvousTransport::AdvanceLocked(Channel& channel) {
  if (channel.posts.empty() || channel.peer_posts.empty()) return;
  const Post& mine = channel.posts.front();
  const Frame& theirs = channel.peer_posts.front();
  const bool peer_sends = theirs.kind == Frame::kPostedSend;
  if (mine.transfer != theirs.transfer || mine.is_send == peer_sends) {
    BreakLocked(channel,
                absl::FailedPreconditionError(absl::StrCat(
                    "rank ", rank_, " posted ", Direction(mine.is_send),
                    " of transfer ", mine.transfer, " where its peer posted ",
                    Direction(peer_sends), " of transfer ", theirs.transfer)));
    return;
  }
  if (mine.is_send && !channel.data_sent) {
    channel.data_sent = true;
    const Frame frame = {Frame::kData,
                         static_cast<uint32_t>(mine.payload.size()),
                         mine.transfer};
    channel.outgoing.append(reinterpret_cast<const char*>(&frame),
                            sizeof(frame));
    channel.outgoing.append(mine.payload);
  }
}

void RendezvousTransport::FinishFirstLocked(Channel& channel,
                                            std::string payload) {
  Transfer& transfer = transfers_[channel.posts.front().transfer];
  transfer.done = Done{std::move(payload), std::chrono::steady_clock::now()};
  channel.posts.pop_front();
  channel.peer_posts.pop_front();
  channel.data_sent = false;
  changed_.notify_all();
  AdvanceLocked(channel);
}

void RendezvousTransport::HandleFrameLocked(Channel& channel,
                                            const Frame& frame,
                                            std::string payload) {
  switch (frame.kind) {
    case Frame::kPostedSend:
    case Frame::kPostedRecv:
      channel.peer_posts.push_back(frame);
      AdvanceLocked(channel);
      return;
    case Frame::kData: {
      if (channel.posts.empty() || channel.posts.front().is_send ||
          channel.posts.front().transfer != frame.transfer) {
        break;
      }
      const Frame done = {Frame::kDone, 0, frame.transfer};
      channel.outgoing.append(reinterpret_cast<const char*>(&done),
                              sizeof(done));
      FinishFirstLocked(channel, std::move(payload));
      return;
    }
    case Frame::kDone:
      if (channel.posts.empty() || !channel.posts.front().is_send ||
          channel.posts.front().transfer != frame.transfer) {
        break;
      }
      FinishFirstLocked(channel, "");
      return;
  }
  BreakLocked(channel, absl::InternalError(
                           absl::StrCat("unexpected frame of kind ", frame.kind,
                                        " for transfer ", frame.transfer)));
}

void RendezvousTransport::ReadLocked(Channel& channel) {
  char buffer[1 << 16];
  while (channel.error.ok()) {
    const ssize_t n = recv(channel.socket, buffer, sizeof(buffer), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return;
    if (n <= 0) {
      BreakLocked(channel, absl::UnavailableError("the peer rank is gone"));
      return;
    }
    channel.incoming.append(buffer, n);
    size_t used = 0;
    while (channel.error.ok() &&
           channel.incoming.size() - used >= sizeof(Frame)) {
      Frame frame;
      std::memcpy(&frame, channel.incoming.data() + used, sizeof(frame));
      if (frame.size > kMaxPayloadBytes) {
        BreakLocked(channel, absl::InternalError("frame too large"));
        return;
      }
      if (channel.incoming.size() - used < sizeof(frame) + frame.size) break;
      HandleFrameLocked(
          channel, frame,
          channel.incoming.substr(used + sizeof(frame), frame.size));
      used += sizeof(frame) + frame.size;
    }
    channel.incoming.erase(0, used);
  }
}

void RendezvousTransport::WriteLocked(Channel& channel) {
  while (channel.error.ok() && !channel.outgoing.empty()) {
    const ssize_t n = send(channel.socket, channel.outgoing.data(),
                           channel.outgoing.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) {
      Wake();
      return;
    }
    if (n <= 0) {
      BreakLocked(channel, absl::UnavailableError("the peer rank is gone"));
      return;
    }
    channel.outgoing.erase(0, n);
  }
}

void RendezvousTransport::BreakLocked(Channel& channel, absl::Status error) {
  if (channel.error.ok()) channel.error = std::move(error);
  changed_.notify_all();
}

absl::StatusOr<RendezvousTransport::Done> RendezvousTransport::Wait(
    uint64_t transfer, std::chrono::steady_clock::time_point deadline) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto it = transfers_.find(transfer);
  if (it == transfers_.end()) {
    return absl::InvalidArgumentError(
        absl::StrCat("transfer ", transfer, " was not posted"));
  }
  while (!it->second.done.has_value()) {
    const absl::Status& error = channels_[it->second.peer].error;
    if (!error.ok()) return error;
    if (changed_.wait_until(lock, deadline) == std::cv_status::timeout &&
        !it->second.done.has_value()) {
      return absl::DeadlineExceededError(
          absl::StrCat("rank ", rank_, " waited too long for transfer ",
                       transfer, " with rank ", it->second.peer));
    }
  }
  Done done = *std::move(it->second.done);
  transfers_.erase(it);
  return done;
}

void RendezvousTransport::Wake() {
  const char byte = 0;
  // A full pipe wakes the thread just as well.
  [[maybe_unused]] const ssize_t n = write(wake_write_, &byte, 1);
}

void RendezvousTransport::Run() {
  std::vector<pollfd> fds;
  std::vector<size_t> peers;
  while (true) {
    fds.assign(1, {wake_read_, POLLIN, 0});
    peers.assign(1, 0);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (stopping_) return;
      for (size_t peer = 0; peer < channels_.size(); ++peer) {
        const Channel& channel = channels_[peer];
        if (channel.socket < 0 || !channel.error.ok()) continue;
        const short out = channel.outgoing.empty() ? 0 : POLLOUT;
        fds.push_back({channel.socket, static_cast<short>(POLLIN | out), 0});
        peers.push_back(peer);
      }
    }
    poll(fds.data(), fds.size(), -1);
    char drained[256];
    while (read(wake_read_, drained, sizeof(drained)) > 0) {
    }
    std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 1; i < fds.size(); ++i) {
      if (fds[i].revents == 0) continue;
      Channel& channel = channels_[peers[i]];
      ReadLocked(channel);
      WriteLocked(channel);
    }
  }
}

}  // namespace pipeweaver::client
