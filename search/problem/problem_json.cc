// JSON reader and writer of problems and schedules; see problem_json.h.

#include "search/problem/problem_json.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "search/problem/field_error.h"
#include "search/problem/problem_validation.h"
#include "semu/base/status_macros.h"

namespace pipeweaver::search {
namespace {

using Json = nlohmann::json;

constexpr size_t kMostDigits = 18;
// Shown of each end of a syntax error's cause.
constexpr size_t kMostCauseBytes = 120;

// Where a value stands, for error messages; made into text only on errors.
struct Path {
  const Path* parent = nullptr;
  const char* name = nullptr;  // a member, else an element
  size_t index = 0;

  std::string Text() const {
    const std::string head = parent == nullptr ? "" : parent->Text();
    if (name == nullptr) return absl::StrCat(head, "[", index, "]");
    return head.empty() ? name : absl::StrCat(head, ".", name);
  }
};

std::string Shown(const Json& value) {
  if (value.is_array()) return absl::StrCat("a list of ", value.size());
  if (value.is_object()) return "an object";
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

absl::Status Wrong(const Path& path, const Json& value,
                   absl::string_view rule) {
  return FieldError(path.Text(), Shown(value), rule);
}

absl::StatusOr<const Json*> Required(const Json& object, const Path& path) {
  const auto at = object.find(path.name);
  if (at == object.end()) {
    return FieldError(path.Text(), "missing", "is required");
  }
  return &*at;
}

const Json* Optional(const Json& object, const char* name) {
  const auto at = object.find(name);
  return at == object.end() ? nullptr : &*at;
}

absl::StatusOr<int64_t> Integer(const Json& value, const Path& path,
                                int64_t most) {
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() <= static_cast<uint64_t>(most)) {
    return static_cast<int64_t>(value.get<uint64_t>());
  }
  // "-0" is read as a signed integer.
  if (value.is_number_integer() && value.get<int64_t>() == 0) return 0;
  return Wrong(path, value,
               most == kMostQuantity
                   ? std::string("must be an integer from 0 to 10^18-1")
                   : absl::StrCat("must be an integer from 0 to ", most));
}

// A time or size: an integer or a string of 1 to 18 digits.
absl::StatusOr<int64_t> Quantity(const Json& value, const Path& path) {
  if (!value.is_string()) return Integer(value, path, kMostQuantity);
  const std::string& digits = value.get_ref<const std::string&>();
  const bool good = !digits.empty() && digits.size() <= kMostDigits &&
                    std::all_of(digits.begin(), digits.end(),
                                [](char c) { return c >= '0' && c <= '9'; });
  if (!good) return Wrong(path, value, "must be a string of 1 to 18 digits");
  int64_t number = 0;
  for (const char digit : digits) number = number * 10 + (digit - '0');
  return number;
}

absl::StatusOr<int64_t> QuantityOr(const Json& object, const Path& path,
                                   int64_t fallback) {
  const Json* value = Optional(object, path.name);
  if (value == nullptr) return fallback;
  return Quantity(*value, path);
}

absl::StatusOr<int64_t> RequiredQuantity(const Json& object, const Path& path) {
  PW_ASSIGN_OR_RETURN(const Json* value, Required(object, path));
  return Quantity(*value, path);
}

absl::StatusOr<bool> Boolean(const Json& value, const Path& path) {
  if (!value.is_boolean()) return Wrong(path, value, "must be true or false");
  return value.get<bool>();
}

absl::StatusOr<const Json*> RequiredList(const Json& object, const Path& path) {
  PW_ASSIGN_OR_RETURN(const Json* value, Required(object, path));
  if (!value->is_array()) return Wrong(path, *value, "must be a list");
  return value;
}

// What the library says of a text that is not JSON: where, what it read last,
// and what it expected.
absl::Status NotJson(absl::string_view what) {
  // "[kind] parse error at line 1, column 2: syntax error while ..."
  const size_t cause = what.find(": ");
  const size_t place = what.find("line ");
  const bool has_place = place < cause && cause != absl::string_view::npos;
  std::string read(has_place ? what.substr(cause + 2) : what);
  // What was read last may be long; what was expected stands behind it.
  if (read.size() > 2 * kMostCauseBytes) {
    read = absl::StrCat(read.substr(0, kMostCauseBytes), "...",
                        read.substr(read.size() - kMostCauseBytes));
  }
  return FieldError("file",
                    has_place ? what.substr(place, cause - place) : "a text",
                    absl::StrCat("must be JSON: ", read));
}

absl::StatusOr<Json> ParseJson(absl::string_view text) {
  try {
    return Json::parse(text.begin(), text.end());
  } catch (const Json::exception& error) {
    return NotJson(error.what());
  }
}

// `name` is empty where it has none.
absl::StatusOr<Choice> ReadChoice(const Json& value, const Path& path,
                                  std::string& name) {
  if (!value.is_object()) return Wrong(path, value, "must be an object");
  Choice choice;
  if (const Json* text = Optional(value, "name"); text != nullptr) {
    if (!text->is_string()) {
      return Wrong({&path, "name"}, *text, "must be a string");
    }
    name = text->get<std::string>();
  }
  PW_ASSIGN_OR_RETURN(choice.forward_ns,
                      RequiredQuantity(value, {&path, "forward_ns"}));
  PW_ASSIGN_OR_RETURN(choice.input_grad_ns,
                      RequiredQuantity(value, {&path, "input_grad_ns"}));
  PW_ASSIGN_OR_RETURN(choice.weight_grad_ns,
                      RequiredQuantity(value, {&path, "weight_grad_ns"}));
  PW_ASSIGN_OR_RETURN(choice.activation_bytes,
                      RequiredQuantity(value, {&path, "activation_bytes"}));
  PW_ASSIGN_OR_RETURN(
      choice.backward_bytes,
      QuantityOr(value, {&path, "backward_bytes"}, choice.activation_bytes));
  PW_ASSIGN_OR_RETURN(
      choice.weight_grad_bytes,
      QuantityOr(value, {&path, "weight_grad_bytes"}, choice.activation_bytes));
  PW_ASSIGN_OR_RETURN(choice.fused_backward_bytes,
                      QuantityOr(value, {&path, "fused_backward_bytes"},
                                 choice.backward_bytes));
  if (const Json* fused = Optional(value, "fused_backward_ns");
      fused != nullptr) {
    PW_ASSIGN_OR_RETURN(choice.fused_backward_ns,
                        Quantity(*fused, {&path, "fused_backward_ns"}));
  }
  return choice;
}

absl::StatusOr<Stage> ReadStage(const Json& value, const Path& path,
                                int64_t p2p_latency_ns) {
  if (!value.is_object()) return Wrong(path, value, "must be an object");
  Stage stage;
  const Path rank_path{&path, "rank"};
  PW_ASSIGN_OR_RETURN(const Json* rank, Required(value, rank_path));
  PW_ASSIGN_OR_RETURN(
      const int64_t rank_number,
      Integer(*rank, rank_path, std::numeric_limits<int>::max()));
  stage.rank = static_cast<int>(rank_number);
  PW_ASSIGN_OR_RETURN(
      stage.transfer_ns,
      QuantityOr(value, {&path, "transfer_ns"}, p2p_latency_ns));
  const Path choices_path{&path, "choices"};
  PW_ASSIGN_OR_RETURN(const Json* choices, RequiredList(value, choices_path));
  std::vector<Choice> read;
  read.reserve(choices->size());
  std::vector<std::string> names;
  for (const Json& choice : *choices) {
    PW_ASSIGN_OR_RETURN(
        read.emplace_back(),
        ReadChoice(choice, {&choices_path, nullptr, read.size()},
                   names.emplace_back()));
  }
  stage.choices = ChoiceList(
      std::move(read),
      std::make_shared<const std::vector<std::string>>(std::move(names)));
  return stage;
}

// Reads all of a segment but `after`.
absl::StatusOr<Sweep> ReadSegment(const Json& value, const Path& path,
                                  int64_t p2p_latency_ns) {
  if (!value.is_object()) return Wrong(path, value, "must be an object");
  Sweep sweep;
  const Path id_path{&path, "id"};
  PW_ASSIGN_OR_RETURN(const Json* id, Required(value, id_path));
  if (!id->is_string()) return Wrong(id_path, *id, "must be a string");
  sweep.id = id->get<std::string>();
  if (const Json* hint = Optional(value, "microbatch"); hint != nullptr) {
    PW_ASSIGN_OR_RETURN(const int64_t number,
                        Integer(*hint, {&path, "microbatch"}, kMostQuantity));
    sweep.microbatch = static_cast<int>(
        std::min<int64_t>(number, std::numeric_limits<int>::max()));
  }
  if (const Json* backward = Optional(value, "backward"); backward != nullptr) {
    PW_ASSIGN_OR_RETURN(sweep.backward,
                        Boolean(*backward, {&path, "backward"}));
  }
  const Path stages_path{&path, "stages"};
  PW_ASSIGN_OR_RETURN(const Json* stages, RequiredList(value, stages_path));
  sweep.stages.reserve(stages->size());
  for (const Json& stage : *stages) {
    PW_ASSIGN_OR_RETURN(
        sweep.stages.emplace_back(),
        ReadStage(stage, {&stages_path, nullptr, sweep.stages.size()},
                  p2p_latency_ns));
  }
  return sweep;
}

using SweepIndex = absl::flat_hash_map<absl::string_view, int>;

SweepIndex IndexSweeps(const Problem& problem) {
  SweepIndex index;
  for (size_t s = 0; s < problem.sweeps.size(); ++s) {
    index.emplace(problem.sweeps[s].id, static_cast<int>(s));
  }
  return index;
}

absl::Status ReadAfter(const Json& value, const Path& path,
                       const SweepIndex& index, Sweep& sweep) {
  if (!value.is_array()) return Wrong(path, value, "must be a list");
  absl::flat_hash_set<int> seen;
  size_t position = 0;
  for (const Json& name : value) {
    const Path name_path{&path, nullptr, position++};
    if (!name.is_string()) return Wrong(name_path, name, "must be a string");
    const auto at = index.find(name.get_ref<const std::string&>());
    if (at == index.end()) {
      return Wrong(name_path, name, "must name an existing segment");
    }
    if (seen.insert(at->second).second) sweep.after.push_back(at->second);
  }
  return absl::OkStatus();
}

absl::StatusOr<StageKind> ReadKind(const Json& value, const Path& path) {
  if (value.is_string()) {
    const std::string& text = value.get_ref<const std::string&>();
    for (const StageKind kind :
         {StageKind::kForward, StageKind::kBackward, StageKind::kInputGrad,
          StageKind::kWeightGrad}) {
      if (text.size() == 1 && text[0] == StageKindLetter(kind)) return kind;
    }
  }
  return Wrong(path, value, "must be F, B, I or W");
}

}  // namespace

absl::StatusOr<Problem> ParseProblemJson(absl::string_view text) {
  PW_ASSIGN_OR_RETURN(const Json root, ParseJson(text));
  if (!root.is_object()) {
    return FieldError("file", Shown(root), "must be an object");
  }
  Problem problem;
  const Path ranks_path{nullptr, "ranks"};
  PW_ASSIGN_OR_RETURN(const Json* ranks, Required(root, ranks_path));
  PW_ASSIGN_OR_RETURN(
      const int64_t rank_count,
      Integer(*ranks, ranks_path, std::numeric_limits<int>::max()));
  problem.ranks = static_cast<int>(rank_count);
  PW_ASSIGN_OR_RETURN(const int64_t p2p_latency_ns,
                      RequiredQuantity(root, {nullptr, "p2p_latency_ns"}));
  const Path split_path{nullptr, "split_backward"};
  PW_ASSIGN_OR_RETURN(const Json* split, Required(root, split_path));
  PW_ASSIGN_OR_RETURN(problem.split_backward, Boolean(*split, split_path));

  const Path limits_path{nullptr, "memory_limit_bytes"};
  PW_ASSIGN_OR_RETURN(const Json* limits, RequiredList(root, limits_path));
  for (const Json& limit : *limits) {
    PW_ASSIGN_OR_RETURN(problem.memory_limit_bytes.emplace_back(),
                        Quantity(limit, {&limits_path, nullptr,
                                         problem.memory_limit_bytes.size()}));
  }

  const Path segments_path{nullptr, "segments"};
  PW_ASSIGN_OR_RETURN(const Json* segments, RequiredList(root, segments_path));
  problem.sweeps.reserve(segments->size());
  for (const Json& segment : *segments) {
    PW_ASSIGN_OR_RETURN(
        problem.sweeps.emplace_back(),
        ReadSegment(segment, {&segments_path, nullptr, problem.sweeps.size()},
                    p2p_latency_ns));
  }
  const SweepIndex index = IndexSweeps(problem);
  for (size_t s = 0; s < problem.sweeps.size(); ++s) {
    const Json* after = Optional((*segments)[s], "after");
    if (after == nullptr) continue;
    const Path segment_path{&segments_path, nullptr, s};
    PW_RETURN_IF_ERROR(
        ReadAfter(*after, {&segment_path, "after"}, index, problem.sweeps[s]));
  }
  PW_RETURN_IF_ERROR(ValidateProblem(problem));
  return problem;
}

absl::Status CheckExact(absl::string_view text,
                        absl::Span<const ExactMember> members) {
  PW_ASSIGN_OR_RETURN(const Json root, ParseJson(text));
  for (const ExactMember& member : members) {
    const Json* claim = Optional(root, member.field);
    if (claim == nullptr) continue;
    // From 2^63 on the fields hold the unsigned value's bits (timing.h).
    const std::string exact = absl::StrCat(static_cast<uint64_t>(member.value));
    std::string claimed =
        claim->is_string() ? claim->get<std::string>() : claim->dump();
    // Strings of digits may have zeros in front.
    while (claimed.size() > 1 && claimed[0] == '0') claimed.erase(0, 1);
    if (claimed != exact) {
      return Wrong({nullptr, member.field}, *claim,
                   absl::StrCat("must be exact, ", exact));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Schedule> ParseScheduleJson(const Problem& problem,
                                           absl::string_view text) {
  PW_ASSIGN_OR_RETURN(const Json root, ParseJson(text));
  if (!root.is_object()) {
    return FieldError("file", Shown(root), "must be an object");
  }
  const Path ranks_path{nullptr, "ranks"};
  PW_ASSIGN_OR_RETURN(const Json* ranks, RequiredList(root, ranks_path));
  if (ranks->size() != static_cast<size_t>(problem.ranks)) {
    return Wrong(ranks_path, *ranks,
                 absl::StrCat("must hold a list for each of the ",
                              problem.ranks, " ranks"));
  }
  const SweepIndex index = IndexSweeps(problem);
  Schedule schedule;
  schedule.ranks.resize(problem.ranks);
  for (int r = 0; r < problem.ranks; ++r) {
    const Json& row = (*ranks)[r];
    const Path row_path{&ranks_path, nullptr, static_cast<size_t>(r)};
    if (!row.is_array()) return Wrong(row_path, row, "must be a list");
    for (size_t i = 0; i < row.size(); ++i) {
      const Path path{&row_path, nullptr, i};
      if (!row[i].is_object()) {
        return Wrong(path, row[i], "must be an object");
      }
      ScheduledStage entry;
      const Path kind_path{&path, "kind"};
      PW_ASSIGN_OR_RETURN(const Json* kind, Required(row[i], kind_path));
      PW_ASSIGN_OR_RETURN(entry.kind, ReadKind(*kind, kind_path));
      const Path segment_path{&path, "segment"};
      PW_ASSIGN_OR_RETURN(const Json* segment, Required(row[i], segment_path));
      const auto at = segment->is_string()
                          ? index.find(segment->get_ref<const std::string&>())
                          : index.end();
      if (at == index.end()) {
        return Wrong(segment_path, *segment, "must name an existing segment");
      }
      entry.sweep = at->second;
      const Sweep& sweep = problem.sweeps[entry.sweep];
      const Path stage_path{&path, "stage"};
      PW_ASSIGN_OR_RETURN(const int64_t stage,
                          RequiredQuantity(row[i], stage_path));
      if (stage >= static_cast<int64_t>(sweep.stages.size())) {
        return FieldError(stage_path.Text(), absl::StrCat(stage),
                          absl::StrCat("segment ", sweep.id, " has ",
                                       sweep.stages.size(), " stages"));
      }
      entry.stage = static_cast<int>(stage);
      const Stage& pair = sweep.stages[entry.stage];
      if (pair.rank != r) {
        return FieldError(path.Text(), absl::StrCat("on rank ", r),
                          absl::StrCat("stage ", entry.stage, " of ", sweep.id,
                                       " belongs on rank ", pair.rank));
      }
      if (entry.kind == StageKind::kForward) {
        const Path choice_path{&path, "choice"};
        PW_ASSIGN_OR_RETURN(const int64_t choice,
                            QuantityOr(row[i], choice_path, 0));
        if (choice >= static_cast<int64_t>(pair.choices.size())) {
          return FieldError(
              choice_path.Text(), absl::StrCat(choice),
              absl::StrCat("the stage has ", pair.choices.size(), " choices"));
        }
        entry.choice = static_cast<int>(choice);
      }
      schedule.ranks[r].push_back(entry);
    }
  }
  // The choice stands on F and holds for the pair.
  std::vector<std::vector<int>> chosen(problem.sweeps.size());
  for (size_t s = 0; s < problem.sweeps.size(); ++s) {
    chosen[s].assign(problem.sweeps[s].stages.size(), 0);
  }
  for (const auto& row : schedule.ranks) {
    for (const ScheduledStage& entry : row) {
      if (entry.kind == StageKind::kForward) {
        chosen[entry.sweep][entry.stage] = entry.choice;
      }
    }
  }
  for (auto& row : schedule.ranks) {
    for (ScheduledStage& entry : row) {
      entry.choice = chosen[entry.sweep][entry.stage];
    }
  }
  return schedule;
}

std::string JsonString(absl::string_view text) {
  return Json(std::string(text))
      .dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string ScheduleToJson(const Problem& problem, const Schedule& schedule,
                           const StageTimes& times,
                           const std::vector<JsonMember>& members) {
  std::vector<std::string> ids;
  ids.reserve(problem.sweeps.size());
  for (const Sweep& sweep : problem.sweeps) ids.push_back(JsonString(sweep.id));
  std::string out = "{";
  for (const auto& [name, value] : members) {
    absl::StrAppend(&out, JsonString(name), ": ", value, ", ");
  }
  out += "\"ranks\": [";
  for (size_t r = 0; r < schedule.ranks.size(); ++r) {
    out += r == 0 ? "\n [" : ",\n [";
    for (size_t i = 0; i < schedule.ranks[r].size(); ++i) {
      const ScheduledStage& entry = schedule.ranks[r][i];
      const StageTimes::Interval& interval = times.ranks[r][i];
      const char letter[] = {StageKindLetter(entry.kind), '\0'};
      absl::StrAppend(&out, i == 0 ? "" : ",\n  ", "{\"kind\": \"", letter,
                      "\", \"segment\": ", ids[entry.sweep],
                      ", \"stage\": ", entry.stage);
      if (entry.kind == StageKind::kForward) {
        absl::StrAppend(&out, ", \"choice\": ", entry.choice);
      }
      absl::StrAppend(
          &out, ", \"start_ns\": ", static_cast<uint64_t>(interval.start_ns),
          ", \"end_ns\": ", static_cast<uint64_t>(interval.end_ns), "}");
    }
    out += "]";
  }
  out += "]}\n";
  return out;
}

std::string ProblemToJson(const Problem& problem) {
  Json root;
  root["ranks"] = problem.ranks;
  root["p2p_latency_ns"] = 0;
  root["split_backward"] = problem.split_backward;
  root["memory_limit_bytes"] = problem.memory_limit_bytes;
  Json segments = Json::array();
  for (const Sweep& sweep : problem.sweeps) {
    Json segment = {{"id", sweep.id},
                    {"microbatch", sweep.microbatch},
                    {"backward", sweep.backward},
                    {"after", Json::array()}};
    for (const int before : sweep.after) {
      segment["after"].push_back(problem.sweeps[before].id);
    }
    for (const Stage& stage : sweep.stages) {
      Json choices = Json::array();
      for (size_t c = 0; c < stage.choices.size(); ++c) {
        const Choice& choice = stage.choices[c];
        Json entry = {{"name", stage.choices.name(c)},
                      {"forward_ns", choice.forward_ns},
                      {"input_grad_ns", choice.input_grad_ns},
                      {"weight_grad_ns", choice.weight_grad_ns},
                      {"activation_bytes", choice.activation_bytes},
                      {"backward_bytes", choice.backward_bytes},
                      {"weight_grad_bytes", choice.weight_grad_bytes},
                      {"fused_backward_bytes", choice.fused_backward_bytes}};
        if (choice.fused_backward_ns.has_value()) {
          entry["fused_backward_ns"] = *choice.fused_backward_ns;
        }
        choices.push_back(std::move(entry));
      }
      segment["stages"].push_back({{"rank", stage.rank},
                                   {"transfer_ns", stage.transfer_ns},
                                   {"choices", std::move(choices)}});
    }
    segments.push_back(std::move(segment));
  }
  root["segments"] = std::move(segments);
  return root.dump(1, ' ', false, Json::error_handler_t::replace) + "\n";
}

}  // namespace pipeweaver::search
