// Programs as a client receives them: any bytes are refused with a reason or
// are a program whose columns mean something.

#include <cstdint>
#include <string>

#include "client_agents/cc/program_check.h"
#include "proto/digest/digest.h"
#include "semu/base/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace v1 = pipeweaver::v1;
  v1::Program program;
  if (!program.ParseFromArray(data, static_cast<int>(size))) return 0;
  // Digests that fit, so that the columns behind them are reached.
  if (program.rank_digests_size() > 0 && program.rank_digests_size() < 64) {
    program.set_rank(program.rank() % program.rank_digests_size());
    program.set_rank_digests(program.rank(),
                             pipeweaver::Sha256(program.actions()));
    program.set_plan_digest(pipeweaver::PlanDigest(
        program.identity(), program.split(),
        {program.rank_digests().begin(), program.rank_digests().end()}));
  }
  const v1::PlanKey key = program.identity().key();
  const uint32_t rank = program.rank();
  const auto checked =
      pipeweaver::client::CheckProgram(std::move(program), key, rank);
  if (!checked.ok()) {
    PW_CHECK(!checked.status().message().empty());
    return 0;
  }
  PW_CHECK(checked->actions.kind_size() == checked->actions.transfer_size());
  return 0;
}
