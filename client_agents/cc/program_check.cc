#include "client_agents/cc/program_check.h"

#include <map>
#include <set>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/protobuf/util/message_differencer.h"
#include "proto/digest/digest.h"

namespace pipeweaver::client {
namespace {

absl::Status Broken(absl::string_view field, int index, uint64_t value,
                    absl::string_view rule) {
  return absl::DataLossError(
      absl::StrCat("actions.", field, "[", index, "]: ", value, ": ", rule));
}

bool IsCompute(int kind) {
  return kind >= v1::ACTION_KIND_FORWARD && kind <= v1::ACTION_KIND_WEIGHT_GRAD;
}

bool IsCopy(int kind) {
  return kind == v1::ACTION_KIND_OFFLOAD || kind == v1::ACTION_KIND_RELOAD ||
         kind == v1::ACTION_KIND_WAIT_COPY;
}

bool IsPost(int kind) {
  return kind == v1::ACTION_KIND_POST_SEND || kind == v1::ACTION_KIND_POST_RECV;
}

bool IsTransferWait(int kind) {
  return kind == v1::ACTION_KIND_WAIT_SEND || kind == v1::ACTION_KIND_WAIT_RECV;
}

absl::Status CheckLengths(const v1::ActionColumns& a) {
  const int n = a.kind_size();
  const std::pair<absl::string_view, int> columns[] = {
      {"sub_microbatch", a.sub_microbatch_size()},
      {"segment", a.segment_size()},
      {"chunk", a.chunk_size()},
      {"choice", a.choice_size()},
      {"transfer", a.transfer_size()},
      {"peer", a.peer_size()},
      {"bytes", a.bytes_size()},
      {"edge_sub_microbatch", a.edge_sub_microbatch_size()},
      {"start_delta_ns", a.start_delta_ns_size()},
      {"duration_ns", a.duration_ns_size()},
      {"gradient", a.gradient_size()},
  };
  for (const auto& [name, size] : columns) {
    if (size != n) {
      return absl::DataLossError(
          absl::StrCat("actions.", name, ": ", size,
                       " values, must be as many as kinds: ", n));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckSplit(const v1::BatchSplit& split) {
  const int n = split.module_size();
  if (split.microbatch_size() != n || split.num_items_size() != n ||
      split.tokens_size() != n) {
    return absl::DataLossError(
        "split: its columns must be of one length, one value a sub-microbatch");
  }
  uint64_t items = 0;
  for (const uint32_t count : split.num_items()) items += count;
  if (items != static_cast<uint64_t>(split.items_size())) {
    return absl::DataLossError(absl::StrCat("split.items: ", split.items_size(),
                                            " values, must be the sum of ",
                                            "num_items: ", items));
  }
  return absl::OkStatus();
}

// Follows one stage pair through the program.
struct PairState {
  bool forward = false;
  bool input_grad = false;
  bool weight_grad = false;
  uint32_t choice = 0;
};

absl::Status CheckCompute(const v1::ActionColumns& a, int i, PairState& pair) {
  const int kind = a.kind(i);
  if (kind == v1::ACTION_KIND_FORWARD) {
    if (pair.forward) return Broken("kind", i, kind, "the forward runs twice");
    pair.forward = true;
    pair.choice = a.choice(i);
    return absl::OkStatus();
  }
  if (!pair.forward) {
    return Broken("kind", i, kind, "comes before its forward");
  }
  if (a.choice(i) != pair.choice) {
    return Broken("choice", i, a.choice(i), "is not its forward's");
  }
  if (kind == v1::ACTION_KIND_WEIGHT_GRAD) {
    if (!pair.input_grad) {
      return Broken("kind", i, kind, "comes before its input gradient");
    }
    if (pair.weight_grad) {
      return Broken("kind", i, kind, "the weight gradient runs twice");
    }
    pair.weight_grad = true;
    return absl::OkStatus();
  }
  if (pair.input_grad)
    return Broken("kind", i, kind, "the backward runs twice");
  pair.input_grad = true;
  pair.weight_grad = kind == v1::ACTION_KIND_BACKWARD;
  return absl::OkStatus();
}

// Number of choices of each of the rank's chunks: module, segment, chunk.
using ChoiceCounts = std::map<std::tuple<uint32_t, uint32_t, uint32_t>, int>;

// The indices of an action's sub-microbatch, chunk, choice and other end.
absl::Status CheckIndices(const CheckedProgram& checked,
                          const ChoiceCounts& choices, int i) {
  const v1::ActionColumns& a = checked.actions;
  const uint32_t sub_microbatches = checked.split.module_size();
  if (a.sub_microbatch(i) >= sub_microbatches) {
    return Broken("sub_microbatch", i, a.sub_microbatch(i),
                  absl::StrCat("must be below ", sub_microbatches));
  }
  if (a.edge_sub_microbatch(i) > sub_microbatches) {
    return Broken("edge_sub_microbatch", i, a.edge_sub_microbatch(i),
                  absl::StrCat("must be at most ", sub_microbatches));
  }
  const uint32_t module =
      checked.split.module(static_cast<int>(a.sub_microbatch(i)));
  const auto chunk = choices.find({module, a.segment(i), a.chunk(i)});
  if (chunk == choices.end()) {
    return Broken("chunk", i, a.chunk(i),
                  absl::StrCat("no chunk of `choices` is it, with module ",
                               module, " and segment ", a.segment(i)));
  }
  if ((IsCompute(a.kind(i)) || IsCopy(a.kind(i))) &&
      a.choice(i) >= static_cast<uint32_t>(chunk->second)) {
    return Broken(
        "choice", i, a.choice(i),
        absl::StrCat("must be below its chunk's choices, ", chunk->second));
  }
  return absl::OkStatus();
}

absl::Status CheckActions(const CheckedProgram& checked) {
  const v1::ActionColumns& a = checked.actions;
  const uint32_t ranks = checked.program.rank_digests_size();
  ChoiceCounts choices;
  for (const v1::ChunkChoices& chunk : checked.program.choices()) {
    choices[{chunk.module(), chunk.segment(), chunk.chunk()}] =
        chunk.choices_size();
  }
  std::map<std::tuple<uint32_t, uint32_t, uint32_t>, PairState> pairs;
  std::map<uint32_t, int> waiting;  // transfer -> kind of its post
  int64_t last_transfer = -1;
  for (int i = 0; i < a.kind_size(); ++i) {
    const int kind = a.kind(i);
    if (kind <= v1::ACTION_KIND_UNSPECIFIED ||
        kind > v1::ACTION_KIND_GRADS_READY) {
      return Broken("kind", i, kind, "no such action");
    }
    if (absl::Status status = CheckIndices(checked, choices, i); !status.ok()) {
      return status;
    }
    if (IsCompute(kind)) {
      if (absl::Status status = CheckCompute(
              a, i, pairs[{a.sub_microbatch(i), a.segment(i), a.chunk(i)}]);
          !status.ok()) {
        return status;
      }
    }
    if (!IsPost(kind) && !IsTransferWait(kind)) continue;
    if (a.peer(i) >= ranks || a.peer(i) == checked.program.rank()) {
      return Broken("peer", i, a.peer(i),
                    absl::StrCat("must be another rank below ", ranks));
    }
    if (IsPost(kind)) {
      if (static_cast<int64_t>(a.transfer(i)) <= last_transfer) {
        return Broken("transfer", i, a.transfer(i),
                      "posts must be in ascending order of transfers");
      }
      last_transfer = a.transfer(i);
      waiting[a.transfer(i)] = kind;
      continue;
    }
    const auto post = waiting.find(a.transfer(i));
    const int wanted = kind == v1::ACTION_KIND_WAIT_SEND
                           ? v1::ACTION_KIND_POST_SEND
                           : v1::ACTION_KIND_POST_RECV;
    if (post == waiting.end() || post->second != wanted) {
      return Broken("transfer", i, a.transfer(i), "waited for, but not posted");
    }
    waiting.erase(post);
  }
  if (!waiting.empty()) {
    return absl::DataLossError(
        absl::StrCat("actions.transfer: ", waiting.begin()->first,
                     ": posted, but never waited for"));
  }
  return absl::OkStatus();
}

absl::Status CheckMoves(const v1::Program& program,
                        const v1::BatchSplit& split) {
  if (!program.has_moves()) return absl::OkStatus();
  const v1::MicrobatchMoves& moves = program.moves();
  const int replicas = moves.num_microbatches_size();
  if (replicas != program.replica_plan_digests_size()) {
    return absl::DataLossError(
        absl::StrCat("moves.num_microbatches: ", replicas,
                     " replicas, must be as many as replica_plan_digests: ",
                     program.replica_plan_digests_size()));
  }
  for (int r = 0; r < replicas; ++r) {
    if (program.replica_plan_digests(r).size() != 32) {
      return absl::DataLossError(absl::StrCat(
          "replica_plan_digests[", r,
          "]: ", program.replica_plan_digests(r).size(), " bytes, must be 32"));
    }
  }
  uint64_t places = 0;
  for (const uint32_t count : moves.num_microbatches()) places += count;
  if (places != static_cast<uint64_t>(moves.from_replica_size()) ||
      places != static_cast<uint64_t>(moves.from_microbatch_size())) {
    return absl::DataLossError(absl::StrCat(
        "moves.from_replica and from_microbatch: ", moves.from_replica_size(),
        " and ", moves.from_microbatch_size(),
        " values, must be the sum of num_microbatches: ", places));
  }
  std::set<std::pair<uint32_t, uint32_t>> seen;
  for (int i = 0; i < moves.from_replica_size(); ++i) {
    const uint32_t replica = moves.from_replica(i);
    const uint32_t microbatch = moves.from_microbatch(i);
    const bool exists =
        replica < static_cast<uint32_t>(replicas) &&
        microbatch < moves.num_microbatches(static_cast<int>(replica));
    if (!exists || !seen.emplace(replica, microbatch).second) {
      return absl::DataLossError(absl::StrCat(
          "moves.from_microbatch[", i, "]: ", microbatch, " of replica ",
          replica, exists ? ": stands in two places" : ": does not exist"));
    }
  }
  // VerifyProgramDigests has found this replica's plan among the replicas'.
  const uint32_t count = moves.num_microbatches(
      static_cast<int>(program.identity().key().replica()));
  if (static_cast<uint32_t>(program.batch().microbatches_size()) != count) {
    return absl::DataLossError(absl::StrCat(
        "batch.microbatches: ", program.batch().microbatches_size(),
        ", must be as many as the replica trains on: ", count));
  }
  for (int i = 0; i < split.microbatch_size(); ++i) {
    if (split.microbatch(i) >= count) {
      return absl::DataLossError(absl::StrCat("split.microbatch[", i,
                                              "]: ", split.microbatch(i),
                                              ": must be below ", count));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CheckedProgram> CheckProgram(v1::Program program,
                                            const v1::PlanKey& key,
                                            uint32_t rank) {
  CheckedProgram checked;
  checked.program = std::move(program);
  const v1::Program& p = checked.program;
  if (!google::protobuf::util::MessageDifferencer::Equals(p.identity().key(),
                                                          key)) {
    return absl::DataLossError(
        absl::StrCat("identity.key: ", p.identity().key().ShortDebugString(),
                     ", asked for ", key.ShortDebugString()));
  }
  if (p.rank() != rank) {
    return absl::DataLossError(
        absl::StrCat("rank: ", p.rank(), ", asked for ", rank));
  }
  if (absl::Status status = VerifyProgramDigests(p); !status.ok()) {
    return status;
  }
  if (!checked.split.ParseFromString(p.split())) {
    return absl::DataLossError("split: does not parse as BatchSplit");
  }
  if (!checked.actions.ParseFromString(p.actions())) {
    return absl::DataLossError("actions: does not parse as ActionColumns");
  }
  if (absl::Status status = CheckSplit(checked.split); !status.ok()) {
    return status;
  }
  if (absl::Status status = CheckMoves(p, checked.split); !status.ok()) {
    return status;
  }
  if (absl::Status status = CheckLengths(checked.actions); !status.ok()) {
    return status;
  }
  if (absl::Status status = CheckActions(checked); !status.ok()) return status;
  return checked;
}

}  // namespace pipeweaver::client
