#include "client_agents/standin/program_walk.h"

#include <sys/socket.h>

#include <thread>

#include "gtest/gtest.h"

namespace pipeweaver::client {
namespace {

void Add(v1::ActionColumns& a, v1::ActionKind kind, int transfer, int peer,
         int64_t duration_ns) {
  a.add_kind(kind);
  a.add_transfer(transfer);
  a.add_peer(peer);
  a.add_bytes(5000);
  a.add_duration_ns(duration_ns);
}

TEST(ProgramWalkTest, RunsTwoRanksAgainstEachOther) {
  CheckedProgram zero;
  Add(zero.actions, v1::ACTION_KIND_FORWARD, 0, 0, 2000000);
  Add(zero.actions, v1::ACTION_KIND_POST_SEND, 0, 1, 0);
  Add(zero.actions, v1::ACTION_KIND_POST_RECV, 1, 1, 0);
  Add(zero.actions, v1::ACTION_KIND_WAIT_SEND, 0, 1, 0);
  Add(zero.actions, v1::ACTION_KIND_WAIT_RECV, 1, 1, 0);
  Add(zero.actions, v1::ACTION_KIND_BACKWARD, 0, 0, 4000000);
  CheckedProgram one;
  Add(one.actions, v1::ACTION_KIND_POST_RECV, 0, 0, 0);
  Add(one.actions, v1::ACTION_KIND_WAIT_RECV, 0, 0, 0);
  Add(one.actions, v1::ACTION_KIND_FORWARD, 0, 0, 2000000);
  Add(one.actions, v1::ACTION_KIND_BACKWARD, 0, 0, 4000000);
  Add(one.actions, v1::ACTION_KIND_POST_SEND, 1, 0, 0);
  Add(one.actions, v1::ACTION_KIND_WAIT_SEND, 1, 0, 0);

  int ends[2];
  ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
  RendezvousTransport transport_zero(0, {-1, ends[0]});
  RendezvousTransport transport_one(1, {ends[1], -1});
  const WalkOptions options = {.time_scale = 0.5, .first_transfer = 1000};
  absl::StatusOr<WalkTimes> times_one;
  std::thread other(
      [&] { times_one = WalkProgram(one, options, transport_one); });
  const absl::StatusOr<WalkTimes> times_zero =
      WalkProgram(zero, options, transport_zero);
  other.join();
  ASSERT_TRUE(times_zero.ok()) << times_zero.status();
  ASSERT_TRUE(times_one.ok()) << times_one.status();
  // Forward, the peer's forward and backward, backward: one after the other.
  EXPECT_GE(times_zero->step_ns, 6000000);
  EXPECT_EQ(times_zero->duration_ns[0], 1000000);
  EXPECT_EQ(times_zero->duration_ns.size(), 6);
  EXPECT_EQ(times_zero->messages, 1);
  EXPECT_EQ(times_zero->message_bytes, 4096);
}

}  // namespace
}  // namespace pipeweaver::client
