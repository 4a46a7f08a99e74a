#include "proto/digest/digest.h"

#include <openssl/sha.h>

#include <memory>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"

namespace pipeweaver {

std::string Sha256(absl::string_view bytes) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

namespace {

// Whether `message`, or a message within it, has unknown fields.
bool HasUnknownFields(const google::protobuf::Message& message) {
  using google::protobuf::FieldDescriptor;
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  if (!reflection.GetUnknownFields(message).empty()) return true;
  const google::protobuf::Descriptor& type = *message.GetDescriptor();
  for (int i = 0; i < type.field_count(); ++i) {
    const FieldDescriptor* field = type.field(i);
    if (field->cpp_type() != FieldDescriptor::CPPTYPE_MESSAGE) continue;
    if (!field->is_repeated()) {
      if (reflection.HasField(message, field) &&
          HasUnknownFields(reflection.GetMessage(message, field))) {
        return true;
      }
      continue;
    }
    const int size = reflection.FieldSize(message, field);
    for (int k = 0; k < size; ++k) {
      if (HasUnknownFields(reflection.GetRepeatedMessage(message, field, k))) {
        return true;
      }
    }
  }
  return false;
}

std::string DeterministicBytes(const google::protobuf::Message& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    message.SerializePartialToCodedStream(&coded);
  }
  return bytes;
}

}  // namespace

std::string CanonicalBytes(const google::protobuf::Message& message) {
  // A copy takes longer than to look for what it would be made for.
  if (!HasUnknownFields(message)) return DeterministicBytes(message);
  std::unique_ptr<google::protobuf::Message> copy(message.New());
  copy->CopyFrom(message);
  copy->DiscardUnknownFields();
  return DeterministicBytes(*copy);
}

std::string CanonicalDigest(const google::protobuf::Message& message) {
  return Sha256(CanonicalBytes(message));
}

std::string PlanDigest(const v1::PlanIdentity& identity,
                       absl::string_view split,
                       const std::vector<std::string>& rank_digests) {
  std::string bytes = CanonicalBytes(identity);
  absl::StrAppend(&bytes, Sha256(split));
  for (const std::string& digest : rank_digests) {
    absl::StrAppend(&bytes, digest);
  }
  return Sha256(bytes);
}

namespace {

// A part that is set where the identity has its digest, and nowhere else.
absl::Status CheckPart(absl::string_view name, bool present,
                       const google::protobuf::Message& part,
                       const std::string& digest) {
  if (present == !digest.empty() &&
      (!present || CanonicalDigest(part) == digest)) {
    return absl::OkStatus();
  }
  return absl::DataLossError(
      absl::StrCat(name, ": ", present ? "set" : "missing",
                   ", and the identity's digest of it is '",
                   absl::BytesToHexString(digest), "'"));
}

absl::Status CheckMovedParts(const v1::Program& program) {
  const v1::PlanIdentity& identity = program.identity();
  absl::Status status = CheckPart("moves", program.has_moves(), program.moves(),
                                  identity.moves_digest());
  if (!status.ok()) return status;
  status = CheckPart("batch", program.has_batch(), program.batch(),
                     identity.moved_batch_digest());
  if (!status.ok()) return status;
  const auto plans = static_cast<uint32_t>(program.replica_plan_digests_size());
  if (!program.has_moves()) {
    if (plans == 0 && !program.has_batch()) return absl::OkStatus();
    return absl::DataLossError(
        "replica_plan_digests, batch: set in a program without moves");
  }
  const uint32_t replica = identity.key().replica();
  if (!program.has_batch() || replica >= plans ||
      program.replica_plan_digests(static_cast<int>(replica)) !=
          program.plan_digest()) {
    return absl::DataLossError(
        absl::StrCat("replica_plan_digests: of ", plans, " replicas, replica ",
                     replica, "'s must be plan_digest, and batch be set"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status VerifyProgramDigests(const v1::Program& program) {
  if (program.rank() >= static_cast<uint32_t>(program.rank_digests_size())) {
    return absl::DataLossError(
        absl::StrCat("rank: ", program.rank(), ", but the program lists ",
                     program.rank_digests_size(), " ranks"));
  }
  if (Sha256(program.actions()) != program.rank_digests(program.rank())) {
    return absl::DataLossError(absl::StrCat(
        "actions: their SHA-256 is not rank_digests[", program.rank(), "]"));
  }
  const std::vector<std::string> digests(program.rank_digests().begin(),
                                         program.rank_digests().end());
  if (PlanDigest(program.identity(), program.split(), digests) !=
      program.plan_digest()) {
    return absl::DataLossError(absl::StrCat(
        "plan_digest: ", absl::BytesToHexString(program.plan_digest()),
        " is not the digest of identity, split and rank_digests"));
  }
  return CheckMovedParts(program);
}

std::string AgreementDigest(const v1::Program& program) {
  if (!program.has_moves()) return std::string();
  std::string bytes = program.identity().moves_digest();
  for (const std::string& digest : program.replica_plan_digests()) {
    absl::StrAppend(&bytes, digest);
  }
  return Sha256(bytes);
}

}  // namespace pipeweaver
