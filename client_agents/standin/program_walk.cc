#include "client_agents/standin/program_walk.h"

#include <algorithm>
#include <string>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pipeweaver::client {
namespace {

using Clock = std::chrono::steady_clock;

// What a transfer carries: its number, repeated up to the wanted size.
std::string Payload(uint64_t transfer, uint64_t bytes, int64_t max_bytes) {
  const size_t size = static_cast<size_t>(std::min<uint64_t>(bytes, max_bytes));
  std::string payload = absl::StrCat("transfer ", transfer, " ");
  payload.resize(std::max(size, payload.size()), '.');
  return payload;
}

}  // namespace

absl::StatusOr<WalkTimes> WalkProgram(const CheckedProgram& program,
                                      const WalkOptions& options,
                                      RendezvousTransport& transport) {
  const v1::ActionColumns& actions = program.actions;
  WalkTimes times;
  times.start_offset_ns.reserve(actions.kind_size());
  times.duration_ns.reserve(actions.kind_size());
  const Clock::time_point begin = Clock::now();
  // The rank's own clock: sleeping past the end of an action must not add up,
  // so each action starts where the one before should have ended.
  Clock::time_point now = begin;
  std::vector<uint64_t> posted_bytes;  // [transfer]
  for (int i = 0; i < actions.kind_size(); ++i) {
    const Clock::time_point start = now;
    const uint64_t transfer = options.first_transfer + actions.transfer(i);
    switch (actions.kind(i)) {
      case v1::ACTION_KIND_FORWARD:
      case v1::ACTION_KIND_BACKWARD:
      case v1::ACTION_KIND_INPUT_GRAD:
      case v1::ACTION_KIND_WEIGHT_GRAD:
        now += std::chrono::nanoseconds(
            static_cast<int64_t>(actions.duration_ns(i) * options.time_scale));
        std::this_thread::sleep_until(now);
        break;
      case v1::ACTION_KIND_POST_SEND: {
        std::string payload =
            Payload(transfer, actions.bytes(i), options.max_payload_bytes);
        ++times.messages;
        times.message_bytes += payload.size();
        transport.PostSend(actions.peer(i), transfer, std::move(payload));
        break;
      }
      case v1::ACTION_KIND_POST_RECV:
        if (posted_bytes.size() <= actions.transfer(i)) {
          posted_bytes.resize(actions.transfer(i) + 1);
        }
        posted_bytes[actions.transfer(i)] = actions.bytes(i);
        transport.PostRecv(actions.peer(i), transfer);
        break;
      case v1::ACTION_KIND_WAIT_SEND:
      case v1::ACTION_KIND_WAIT_RECV: {
        absl::StatusOr<RendezvousTransport::Done> done =
            transport.Wait(transfer, Clock::now() + options.transfer_timeout);
        if (!done.ok()) return done.status();
        if (actions.kind(i) == v1::ACTION_KIND_WAIT_RECV &&
            done->payload != Payload(transfer,
                                     posted_bytes[actions.transfer(i)],
                                     options.max_payload_bytes)) {
          return absl::DataLossError(
              absl::StrCat("transfer ", transfer, " carried other data"));
        }
        // What arrived while the rank computed costs no time.
        now = std::max(now, done->time);
        break;
      }
      default:
        break;
    }
    times.start_offset_ns.push_back((start - begin).count());
    times.duration_ns.push_back((now - start).count());
  }
  times.step_ns = std::max<int64_t>(1, (now - begin).count());
  return times;
}

}  // namespace pipeweaver::client
