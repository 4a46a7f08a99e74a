// Digests of messages and plans, as job.proto and plan.proto define them.
// Shared by the server and by clients that verify what they received.

#ifndef PROTO_DIGEST_DIGEST_H_
#define PROTO_DIGEST_DIGEST_H_

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "google/protobuf/message.h"
#include "pipeweaver/v1/plan.pb.h"

namespace pipeweaver {

// SHA-256 of `bytes`: 32 bytes.
std::string Sha256(absl::string_view bytes);

// The canonical form of a message: what its digest is taken over. Unknown
// fields are left out.
std::string CanonicalBytes(const google::protobuf::Message& message);

// SHA-256 of the canonical form.
std::string CanonicalDigest(const google::protobuf::Message& message);

// Digest of a plan from its identity, its serialised split and the SHA-256 of
// every rank's serialised actions (see plan.proto).
std::string PlanDigest(const v1::PlanIdentity& identity,
                       absl::string_view split,
                       const std::vector<std::string>& rank_digests);

// Checks that a program's actions, split, moves and batch are those that its
// plan digest was taken over, and that the plan is the one that stands for its
// replica where replicas name each other's. Errors: DATA_LOSS naming the part
// that does not match.
absl::Status VerifyProgramDigests(const v1::Program& program);

// What the ranks of all replicas agree on before they run programs whose
// microbatches were moved, 32 bytes; empty for a program without moves.
std::string AgreementDigest(const v1::Program& program);

}  // namespace pipeweaver

#endif  // PROTO_DIGEST_DIGEST_H_
