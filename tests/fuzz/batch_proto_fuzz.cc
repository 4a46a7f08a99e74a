// Batch metadata of one fixed job: accepted or refused with a reason, and what
// is accepted keeps the promises of semu/model/batch.h.

#include <cstdint>

#include "pipeweaver/v1/batch.pb.h"
#include "semu/base/check.h"
#include "semu/model/batch_proto.h"
#include "semu/model/job_proto.h"
#include "semu/model/setups.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace semu = pipeweaver::semu;
  static const semu::Job* const job =
      new semu::Job(*semu::JobFromProto(*semu::MakeSetup("vlm-s")));
  pipeweaver::v1::BatchMetadata proto;
  if (!proto.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto batch = semu::BatchFromProto(proto, *job);
  if (!batch.ok()) {
    PW_CHECK(!batch.status().message().empty());
    return 0;
  }
  PW_CHECK(batch->microbatches.size() ==
           static_cast<size_t>(proto.microbatches_size()));
  for (const semu::Microbatch& microbatch : batch->microbatches) {
    PW_CHECK(microbatch.item_tokens.size() == job->modules.size());
    PW_CHECK(microbatch.uses.size() == job->edges.size());
    for (size_t e = 0; e < job->edges.size(); ++e) {
      const auto& producers = microbatch.item_tokens[job->edges[e].producer];
      const auto& consumers = microbatch.item_tokens[job->edges[e].consumer];
      for (const semu::ItemUse& use : microbatch.uses[e]) {
        PW_CHECK(use.producer_item >= 0 && use.consumer_item >= 0);
        PW_CHECK(use.producer_item < static_cast<int>(producers.size()));
        PW_CHECK(use.consumer_item < static_cast<int>(consumers.size()));
      }
    }
  }
  return 0;
}
