#include "search/move_checker.h"

#include <functional>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pipeweaver::search {
namespace {

using ::testing::HasSubstr;

semu::Batch BatchOf(std::initializer_list<int64_t> tokens) {
  semu::Batch batch;
  for (const int64_t n : tokens) {
    batch.microbatches.emplace_back().item_tokens = {{n}};
  }
  return batch;
}

struct Dealt {
  semu::Batch first = BatchOf({10, 20});
  semu::Batch second = BatchOf({30});
  MicrobatchMoves moves = {{{1, 0}, {0, 0}}, {{0, 1}}};
  std::vector<semu::Batch> batches = {BatchOf({30, 10}), BatchOf({20})};
};

absl::Status Check(const std::function<void(Dealt&)>& change) {
  Dealt dealt;
  change(dealt);
  const semu::Batch* batches[] = {&dealt.first, &dealt.second};
  return CheckMoves(batches, dealt.moves, dealt.batches);
}

std::string Error(const std::function<void(Dealt&)>& change) {
  const absl::Status status = Check(change);
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  return std::string(status.message());
}

TEST(MoveCheckerTest, AcceptsEachMicrobatchInOnePlace) {
  EXPECT_TRUE(Check([](Dealt&) {}).ok());
}

TEST(MoveCheckerTest, NamesThePlaceThatBreaksARule) {
  EXPECT_THAT(Error([](Dealt& d) {
                d.moves[1][0] = {0, 0};
              }),
              HasSubstr("replica 1, place 0: microbatch 0 of replica 0 stands "
                        "in two places"));
  EXPECT_THAT(Error([](Dealt& d) {
                d.moves[0][0] = {1, 1};
              }),
              HasSubstr("microbatch 1 of replica 1 does not exist"));
  EXPECT_THAT(Error([](Dealt& d) {
                d.moves[0][0] = {-1, 0};
              }),
              HasSubstr("does not exist"));
  EXPECT_THAT(Error([](Dealt& d) { d.moves[0].pop_back(); }),
              HasSubstr("replica 0 has 1 places and 2 microbatches"));
  EXPECT_THAT(Error([](Dealt& d) { d.batches.pop_back(); }),
              HasSubstr("2 replicas with 1 batches"));
  EXPECT_THAT(Error([](Dealt& d) { std::swap(d.moves[0][0], d.moves[0][1]); }),
              HasSubstr("is not what was dealt out"));
  EXPECT_THAT(Error([](Dealt& d) { d.second.forward_only = true; }),
              HasSubstr("another forward_only"));
}

}  // namespace
}  // namespace pipeweaver::search
