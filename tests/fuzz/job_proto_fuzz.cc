// Jobs and layouts: whatever is accepted comes back the same through its value.

#include <cstdint>

#include "pipeweaver/v1/job.pb.h"
#include "proto/digest/digest.h"
#include "semu/base/check.h"
#include "semu/model/job_proto.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  namespace semu = pipeweaver::semu;
  pipeweaver::v1::Job proto;
  if (!proto.ParseFromArray(data, static_cast<int>(size))) return 0;
  const auto job = semu::JobFromProto(proto);
  if (!job.ok()) {
    PW_CHECK(!job.status().message().empty());
    return 0;
  }
  PW_CHECK(job->modules.size() == static_cast<size_t>(proto.modules_size()));
  const auto layout = semu::LayoutFromProto(proto.layout(), *job);
  if (!layout.ok()) return 0;
  const auto written = semu::LayoutToProto(*layout, *job);
  const auto again = semu::LayoutFromProto(written, *job);
  PW_CHECK(again.ok());
  PW_CHECK(pipeweaver::CanonicalBytes(semu::LayoutToProto(*again, *job)) ==
           pipeweaver::CanonicalBytes(written));
  return 0;
}
