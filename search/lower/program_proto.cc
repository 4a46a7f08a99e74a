#include "search/lower/program_proto.h"

#include <limits>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "google/protobuf/io/coded_stream.h"
#include "proto/digest/digest.h"
#include "search/strategy/worker_pool.h"
#include "semu/base/limits.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

using google::protobuf::io::CodedOutputStream;

constexpr size_t kDigestBytes = 32;  // SHA-256
constexpr uint64_t kMostInt64 = std::numeric_limits<int64_t>::max();

constexpr uint32_t LengthDelimitedTag(int field) {
  constexpr uint32_t kLengthDelimited = 2;
  return static_cast<uint32_t>(field) << 3 | kLengthDelimited;
}

bool IsPost(ActionKind kind) {
  return kind == ActionKind::kPostSend || kind == ActionKind::kPostRecv;
}

v1::BatchSplit SplitToProto(const StepProblem& step) {
  v1::BatchSplit split;
  for (const SubMicrobatch& sub : step.sub_microbatches) {
    split.add_module(sub.module);
    split.add_microbatch(sub.microbatch);
    split.add_num_items(static_cast<uint32_t>(sub.items.size()));
    split.add_tokens(sub.tokens);
    for (int item : sub.items) split.add_items(item);
  }
  const int num_modules = static_cast<int>(step.choices.size());
  for (const auto& [microbatch, module] : step.empty) {
    split.add_empty(microbatch * num_modules + module);
  }
  return split;
}

// What stands before the value of a field that is a message, a string or
// packed.
size_t HeadSize(int field, size_t value_size) {
  return CodedOutputStream::VarintSize32(LengthDelimitedTag(field)) +
         CodedOutputStream::VarintSize64(value_size);
}

void AppendHead(int field, size_t value_size, std::string* message) {
  uint8_t head[20];
  uint8_t* end =
      CodedOutputStream::WriteTagToArray(LengthDelimitedTag(field), head);
  end = CodedOutputStream::WriteVarint64ToArray(value_size, end);
  message->append(reinterpret_cast<const char*>(head),
                  static_cast<size_t>(end - head));
}

// A message of packed columns that all have `rows` values, fields 1 to
// kColumns, in protobuf's wire form: much less work than to build the message
// first.
template <int kColumns>
class PackedColumns {
 public:
  explicit PackedColumns(size_t rows)
      : capacity_(rows * kMostVarintBytes),
        bytes_(new uint8_t[kColumns * capacity_]) {
    for (int c = 0; c < kColumns; ++c) end_[c] = begin(c);
  }

  void Add(int field, uint64_t value) {
    uint8_t* const end = end_[field - 1];
    if (value < 0x80) {  // most are
      *end = static_cast<uint8_t>(value);
      end_[field - 1] = end + 1;
    } else {
      end_[field - 1] = CodedOutputStream::WriteVarint64ToArray(value, end);
    }
  }
  void AddSigned(int field, int64_t value) {
    // Zigzag: small numbers of either sign are short.
    Add(field,
        static_cast<uint64_t>(value) << 1 ^ static_cast<uint64_t>(value >> 63));
  }

  // Bytes of the message.
  size_t size() const {
    size_t bytes = 0;
    for (int c = 0; c < kColumns; ++c) {
      if (column(c).empty()) continue;
      bytes += HeadSize(c + 1, column(c).size()) + column(c).size();
    }
    return bytes;
  }

  void AppendTo(std::string* message) const {
    for (int c = 0; c < kColumns; ++c) {
      if (column(c).empty()) continue;
      AppendHead(c + 1, column(c).size(), message);
      absl::StrAppend(message, column(c));
    }
  }

 private:
  static constexpr size_t kMostVarintBytes = 10;

  uint8_t* begin(int column) const {
    return bytes_.get() + static_cast<size_t>(column) * capacity_;
  }
  absl::string_view column(int column) const {
    return {reinterpret_cast<const char*>(begin(column)),
            static_cast<size_t>(end_[column] - begin(column))};
  }

  size_t capacity_;  // of a column
  std::unique_ptr<uint8_t[]> bytes_;
  uint8_t* end_[kColumns];
};

using ActionColumns = PackedColumns<v1::ActionColumns::kGradientFieldNumber>;

// Writes a rank's program to `columns`, which are empty.
void WriteActions(const StepProblem& step, const StepPrograms& programs,
                  int rank, ActionColumns& columns) {
  using Columns = v1::ActionColumns;
  const std::vector<Action>& program = programs.ranks[rank];
  int64_t previous_start_ns = 0;
  for (const Action& a : program) {
    const SweepOrigin& origin = step.sweeps[a.sweep];
    const bool posts = IsPost(a.kind);
    uint64_t transfer = 0, peer = 0, bytes = 0, edge = 0, gradient = 0;
    if (IsTransfer(a.kind)) {
      const Transfer& x = programs.transfers[a.transfer];
      const bool sends = x.from_rank == rank;
      const int other =
          step.sweeps[sends ? x.to_sweep : x.from_sweep].sub_microbatch;
      const bool within_module =
          other == origin.sub_microbatch ||
          step.sub_microbatches[other].module ==
              step.sub_microbatches[origin.sub_microbatch].module;
      transfer = static_cast<uint64_t>(a.transfer);
      peer = static_cast<uint64_t>(sends ? x.to_rank : x.from_rank);
      bytes = posts ? static_cast<uint64_t>(x.bytes) : 0;
      edge = within_module ? 0 : static_cast<uint64_t>(other) + 1;
      gradient = x.gradient ? 1 : 0;
    }
    columns.Add(Columns::kKindFieldNumber,
                static_cast<uint64_t>(a.kind) + v1::ACTION_KIND_FORWARD);
    columns.Add(Columns::kSubMicrobatchFieldNumber,
                static_cast<uint64_t>(origin.sub_microbatch));
    columns.Add(Columns::kSegmentFieldNumber,
                static_cast<uint64_t>(origin.segment));
    columns.Add(Columns::kChunkFieldNumber, static_cast<uint64_t>(a.stage));
    columns.Add(Columns::kChoiceFieldNumber, static_cast<uint64_t>(a.choice));
    columns.Add(Columns::kTransferFieldNumber, transfer);
    columns.Add(Columns::kPeerFieldNumber, peer);
    columns.Add(Columns::kBytesFieldNumber, bytes);
    columns.Add(Columns::kEdgeSubMicrobatchFieldNumber, edge);
    columns.AddSigned(Columns::kStartDeltaNsFieldNumber,
                      a.start_ns - previous_start_ns);
    columns.Add(Columns::kDurationNsFieldNumber,
                posts ? 0 : static_cast<uint64_t>(a.end_ns - a.start_ns));
    columns.Add(Columns::kGradientFieldNumber, gradient);
    previous_start_ns = a.start_ns;
  }
}

// [module][segment][chunk]: the rank it stands on, -1 where no sweep says.
std::vector<std::vector<std::vector<int>>> ChunkRanks(const StepProblem& step) {
  std::vector<std::vector<std::vector<int>>> ranks(step.choices.size());
  for (size_t m = 0; m < step.choices.size(); ++m) {
    for (const auto& segment : step.choices[m]) {
      ranks[m].emplace_back(segment.size(), -1);
    }
  }
  for (size_t s = 0; s < step.sweeps.size(); ++s) {
    const SweepOrigin& origin = step.sweeps[s];
    const int module = step.sub_microbatches[origin.sub_microbatch].module;
    std::vector<int>& chunks = ranks[module][origin.segment];
    // One sweep of a segment says it for all.
    if (!chunks.empty() && chunks.front() >= 0) continue;
    const std::vector<Stage>& stages = step.problem.sweeps[s].stages;
    for (size_t k = 0; k < stages.size(); ++k) chunks[k] = stages[k].rank;
  }
  return ranks;
}

// What stands before the actions in a rank's program. Digests have one length,
// so it is as long with others.
std::string SerializeHead(const v1::PlanIdentity& identity, int rank,
                          const std::string& plan_digest,
                          const std::vector<std::string>& rank_digests,
                          const std::string& split) {
  v1::Program head;
  *head.mutable_identity() = identity;
  head.set_plan_digest(plan_digest);
  head.set_rank(rank);
  for (const std::string& digest : rank_digests) head.add_rank_digests(digest);
  head.set_split(split);
  return head.SerializeAsString();
}

// What stands behind them: the choices of the rank's chunks.
std::string SerializeTail(
    const StepProblem& step,
    const std::vector<std::vector<std::vector<int>>>& chunk_ranks, int rank) {
  v1::Program tail;
  for (size_t m = 0; m < step.choices.size(); ++m) {
    for (size_t k = 0; k < step.choices[m].size(); ++k) {
      for (size_t c = 0; c < step.choices[m][k].size(); ++c) {
        if (chunk_ranks[m][k][c] != rank) continue;
        v1::ChunkChoices* chunk = tail.add_choices();
        chunk->set_module(static_cast<uint32_t>(m));
        chunk->set_segment(static_cast<uint32_t>(k));
        chunk->set_chunk(static_cast<uint32_t>(c));
        for (const MemoryChoice& choice : step.choices[m][k][c]) {
          v1::MemoryChoice* out = chunk->add_choices();
          out->set_name(choice.name);
          out->set_offload_layers(choice.offload_layers);
          out->set_full_recompute_layers(choice.full_recompute_layers);
          out->set_selective_recompute_layers(
              choice.selective_recompute_layers);
          out->set_keep_layers(choice.keep_layers);
        }
      }
    }
  }
  return tail.SerializeAsString();
}

template <typename Value>
absl::Status Invalid(absl::string_view field, int index, Value value,
                     absl::string_view rule) {
  return absl::InvalidArgumentError(
      absl::StrCat("program.", field, "[", index, "]: ", value, ", ", rule));
}

absl::Status CheckLength(absl::string_view field, int length, int expected) {
  if (length == expected) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("program.", field, ": ", length,
                   " values, must be as many as those beside it: ", expected));
}

}  // namespace

PlanBytes SerializePlan(const StepProblem& step, const StepPrograms& programs,
                        const v1::PlanIdentity& identity, WorkerPool* pool) {
  const int ranks = static_cast<int>(programs.ranks.size());
  const std::string split = SplitToProto(step).SerializeAsString();
  const std::vector<std::vector<std::vector<int>>> chunk_ranks =
      ChunkRanks(step);
  // Programs are written with blank digests first: the plan's is known once all
  // actions are.
  const std::string blank(kDigestBytes, '\0');
  const std::vector<std::string> blanks(ranks, blank);
  // Made here, where step after step the same memory serves: a new thread of
  // the pool would have to get its own from the kernel, page by page.
  std::vector<ActionColumns> columns;
  columns.reserve(ranks);
  for (const auto& rank : programs.ranks) columns.emplace_back(rank.size());
  PlanBytes plan;
  plan.programs.resize(ranks);
  std::vector<std::string> digests(ranks);
  RunOn(pool, ranks, [&](int, int r) {
    constexpr int kActions = v1::Program::kActionsFieldNumber;
    const std::string head = SerializeHead(identity, r, blank, blanks, split);
    ActionColumns& actions = columns[r];
    WriteActions(step, programs, r, actions);
    const size_t size = actions.size();
    const std::string tail = SerializeTail(step, chunk_ranks, r);
    std::string& program = plan.programs[r];
    program.reserve(head.size() + HeadSize(kActions, size) + size +
                    tail.size());
    program = head;
    // A program without actions has no such field.
    if (size > 0) AppendHead(kActions, size, &program);
    actions.AppendTo(&program);
    digests[r] =
        Sha256(absl::string_view(program).substr(program.size() - size));
    program += tail;
  });
  plan.plan_digest = PlanDigest(identity, split, digests);
  for (int r = 0; r < ranks; ++r) {
    const std::string head =
        SerializeHead(identity, r, plan.plan_digest, digests, split);
    plan.programs[r].replace(0, head.size(), head);
  }
  return plan;
}

absl::StatusOr<ParsedProgram> ParseProgram(absl::string_view bytes) {
  v1::Program program;
  if (bytes.size() > static_cast<size_t>(std::numeric_limits<int>::max()) ||
      !program.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::InvalidArgumentError(absl::StrCat(
        "program: ", bytes.size(), " bytes that do not parse as a Program"));
  }
  PW_RETURN_IF_ERROR(VerifyProgramDigests(program));
  v1::BatchSplit split;
  if (!split.ParseFromString(program.split())) {
    return absl::InvalidArgumentError(
        "program.split: does not parse as a BatchSplit");
  }
  v1::ActionColumns columns;
  if (!columns.ParseFromString(program.actions())) {
    return absl::InvalidArgumentError(
        "program.actions: does not parse as ActionColumns");
  }
  const int subs = split.module_size();
  PW_RETURN_IF_ERROR(
      CheckLength("split.microbatch", split.microbatch_size(), subs));
  for (int i = 0; i < subs; ++i) {
    if (split.module(i) >= semu::kMaxModules) {
      return Invalid("split.module", i, split.module(i),
                     absl::StrCat("must be below ", semu::kMaxModules));
    }
    if (split.microbatch(i) >= semu::kMaxMicrobatches) {
      return Invalid("split.microbatch", i, split.microbatch(i),
                     absl::StrCat("must be below ", semu::kMaxMicrobatches));
    }
  }
  const int n = columns.kind_size();
  PW_RETURN_IF_ERROR(
      CheckLength("actions.sub_microbatch", columns.sub_microbatch_size(), n));
  PW_RETURN_IF_ERROR(CheckLength("actions.segment", columns.segment_size(), n));
  PW_RETURN_IF_ERROR(CheckLength("actions.chunk", columns.chunk_size(), n));
  PW_RETURN_IF_ERROR(CheckLength("actions.choice", columns.choice_size(), n));
  PW_RETURN_IF_ERROR(
      CheckLength("actions.transfer", columns.transfer_size(), n));
  PW_RETURN_IF_ERROR(CheckLength("actions.peer", columns.peer_size(), n));
  PW_RETURN_IF_ERROR(CheckLength("actions.bytes", columns.bytes_size(), n));
  PW_RETURN_IF_ERROR(CheckLength("actions.edge_sub_microbatch",
                                 columns.edge_sub_microbatch_size(), n));
  PW_RETURN_IF_ERROR(
      CheckLength("actions.start_delta_ns", columns.start_delta_ns_size(), n));
  PW_RETURN_IF_ERROR(
      CheckLength("actions.duration_ns", columns.duration_ns_size(), n));
  PW_RETURN_IF_ERROR(
      CheckLength("actions.gradient", columns.gradient_size(), n));

  ParsedProgram parsed;
  parsed.identity = program.identity();
  parsed.plan_digest = program.plan_digest();
  parsed.rank = static_cast<int>(program.rank());
  parsed.num_ranks = program.rank_digests_size();
  parsed.rows.reserve(n);
  int64_t start_ns = 0;
  for (int i = 0; i < n; ++i) {
    ProgramRow row;
    const int kind = columns.kind(i);
    if (kind < v1::ACTION_KIND_FORWARD ||
        kind >= v1::ACTION_KIND_FORWARD + kNumActionKinds) {
      return Invalid("actions.kind", i, kind, "is no ActionKind");
    }
    row.kind = static_cast<ActionKind>(kind - v1::ACTION_KIND_FORWARD);
    row.sub_microbatch = columns.sub_microbatch(i);
    if (row.sub_microbatch >= static_cast<uint32_t>(subs)) {
      return Invalid("actions.sub_microbatch", i, row.sub_microbatch,
                     absl::StrCat("must be below ", subs));
    }
    row.module = split.module(static_cast<int>(row.sub_microbatch));
    row.microbatch = split.microbatch(static_cast<int>(row.sub_microbatch));
    row.segment = columns.segment(i);
    row.chunk = columns.chunk(i);
    row.choice = columns.choice(i);
    row.transfer = columns.transfer(i);
    row.peer = columns.peer(i);
    row.bytes = columns.bytes(i);
    if (row.bytes > kMostInt64) {
      return Invalid("actions.bytes", i, row.bytes, "must be below 2^63");
    }
    row.gradient = columns.gradient(i);
    row.edge_sub_microbatch = columns.edge_sub_microbatch(i);
    if (row.edge_sub_microbatch > static_cast<uint32_t>(subs)) {
      return Invalid("actions.edge_sub_microbatch", i, row.edge_sub_microbatch,
                     absl::StrCat("must be at most ", subs));
    }
    if (IsTransfer(row.kind) &&
        (row.peer >= static_cast<uint32_t>(parsed.num_ranks) ||
         row.peer == program.rank())) {
      return Invalid(
          "actions.peer", i, row.peer,
          absl::StrCat("must be another rank below ", parsed.num_ranks));
    }
    if (__builtin_add_overflow(start_ns, columns.start_delta_ns(i),
                               &start_ns) ||
        start_ns < 0) {
      return Invalid("actions.start_delta_ns", i, columns.start_delta_ns(i),
                     "the start must stay within 0 .. 2^63-1");
    }
    row.start_ns = start_ns;
    if (columns.duration_ns(i) > kMostInt64 - static_cast<uint64_t>(start_ns)) {
      return Invalid("actions.duration_ns", i, columns.duration_ns(i),
                     "the end must stay below 2^63");
    }
    row.end_ns = start_ns + static_cast<int64_t>(columns.duration_ns(i));
    parsed.rows.push_back(row);
  }
  return parsed;
}

}  // namespace pipeweaver::search
