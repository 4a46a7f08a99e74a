#include "client_agents/standin/rendezvous_transport.h"

#include <sys/socket.h>

#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::client {
namespace {

using ::testing::HasSubstr;

std::chrono::steady_clock::time_point Soon() {
  return std::chrono::steady_clock::now() + std::chrono::seconds(30);
}

// Long enough for what must not happen to happen on a busy machine, mostly.
std::chrono::steady_clock::time_point Shortly() {
  return std::chrono::steady_clock::now() + std::chrono::milliseconds(50);
}

class RendezvousTransportTest : public testing::Test {
 protected:
  RendezvousTransportTest() {
    int ends[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    zero_ =
        std::make_unique<RendezvousTransport>(0, std::vector<int>{-1, ends[0]});
    one_ =
        std::make_unique<RendezvousTransport>(1, std::vector<int>{ends[1], -1});
  }
  std::unique_ptr<RendezvousTransport> zero_;
  std::unique_ptr<RendezvousTransport> one_;
};

TEST_F(RendezvousTransportTest, CarriesPayloadsBothWays) {
  zero_->PostSend(1, 0, "activation");
  zero_->PostRecv(1, 1);
  one_->PostRecv(0, 0);
  one_->PostSend(0, 1, std::string(100000, 'g'));
  const auto activation = one_->Wait(0, Soon());
  ASSERT_TRUE(activation.ok()) << activation.status();
  EXPECT_EQ(activation->payload, "activation");
  const auto gradient = zero_->Wait(1, Soon());
  ASSERT_TRUE(gradient.ok()) << gradient.status();
  EXPECT_EQ(gradient->payload, std::string(100000, 'g'));
  EXPECT_TRUE(zero_->Wait(0, Soon()).ok());
  EXPECT_TRUE(one_->Wait(1, Soon()).ok());
}

TEST_F(RendezvousTransportTest, ASendWaitsForItsReceive) {
  zero_->PostSend(1, 0, "x");
  EXPECT_EQ(zero_->Wait(0, Shortly()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  one_->PostRecv(0, 0);
  EXPECT_TRUE(zero_->Wait(0, Soon()).ok());
}

TEST_F(RendezvousTransportTest, ALaterTransferWaitsForTheOneBefore) {
  zero_->PostSend(1, 0, "first");
  zero_->PostRecv(1, 1);
  one_->PostRecv(0, 0);
  ASSERT_TRUE(one_->Wait(0, Soon()).ok());
  // Transfer 1 is posted on rank 0 alone: transfer 2 stands behind it.
  zero_->PostSend(1, 2, "third");
  EXPECT_EQ(zero_->Wait(2, Shortly()).status().code(),
            absl::StatusCode::kDeadlineExceeded);
  one_->PostSend(0, 1, "second");
  one_->PostRecv(0, 2);
  EXPECT_TRUE(zero_->Wait(2, Soon()).ok());
}

TEST_F(RendezvousTransportTest, NamesPostsThatDoNotMatch) {
  zero_->PostSend(1, 0, "x");
  one_->PostSend(0, 1, "y");
  const absl::Status status = zero_->Wait(0, Soon()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("a send of transfer 0 where its peer posted a send of "
                        "transfer 1"));
}

// Whichever of the two hears of the other first.
TEST_F(RendezvousTransportTest, BothSidesHearOfPostsThatDoNotMatch) {
  for (int round = 0; round < 200; ++round) {
    int ends[2];
    ASSERT_EQ(socketpair(AF_UNIX, SOCK_STREAM, 0, ends), 0);
    RendezvousTransport zero(0, {-1, ends[0]}), one(1, {ends[1], -1});
    zero.PostSend(1, 0, "x");
    if (round % 2 != 0) std::this_thread::yield();
    one.PostSend(0, 1, "y");
    EXPECT_EQ(zero.Wait(0, Soon()).status().code(),
              absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(one.Wait(1, Soon()).status().code(),
              absl::StatusCode::kFailedPrecondition);
  }
}

TEST_F(RendezvousTransportTest, TellsThatThePeerIsGone) {
  zero_->PostRecv(1, 0);
  one_.reset();
  EXPECT_EQ(zero_->Wait(0, Soon()).status().code(),
            absl::StatusCode::kUnavailable);
}

TEST_F(RendezvousTransportTest, RefusesToWaitForWhatWasNotPosted) {
  EXPECT_EQ(zero_->Wait(3, Soon()).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace pipeweaver::client
