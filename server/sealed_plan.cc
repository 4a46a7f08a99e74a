// See sealed_plan.h.

#include "server/sealed_plan.h"

#include "absl/container/flat_hash_set.h"
#include "absl/container/inlined_vector.h"
#include "absl/strings/str_cat.h"

namespace pipeweaver::server {
namespace {

template <typename T>
int64_t VectorBytes(const std::vector<T>& values) {
  return static_cast<int64_t>(values.capacity() * sizeof(T));
}

template <typename T, size_t kInline>
int64_t VectorBytes(const absl::InlinedVector<T, kInline>& values) {
  return values.capacity() <= kInline
             ? 0
             : static_cast<int64_t>(values.capacity() * sizeof(T));
}

template <typename Row>
int64_t NestedBytes(const std::vector<Row>& rows) {
  int64_t bytes = VectorBytes(rows);
  for (const Row& row : rows) bytes += VectorBytes(row);
  return bytes;
}

int64_t StepBytes(const search::StepProblem& step) {
  int64_t bytes = VectorBytes(step.sub_microbatches) +
                  VectorBytes(step.shapes) + VectorBytes(step.sweeps);
  for (const search::SubMicrobatch& part : step.sub_microbatches) {
    bytes += VectorBytes(part.items);
  }
  bytes += VectorBytes(step.output_bytes) + NestedBytes(step.after_bytes);
  for (const auto& segments : step.choices) {
    for (const auto& chunks : segments) {
      for (const std::vector<search::MemoryChoice>& choices : chunks) {
        bytes += VectorBytes(choices);
        for (const search::MemoryChoice& choice : choices) {
          bytes += static_cast<int64_t>(choice.name.capacity());
        }
      }
    }
  }
  absl::flat_hash_set<const search::Choice*> counted;
  counted.reserve(step.problem.sweeps.size());
  const search::Choice* last = nullptr;
  for (const search::Sweep& sweep : step.problem.sweeps) {
    bytes += sizeof(sweep) + sweep.id.capacity() + VectorBytes(sweep.after) +
             VectorBytes(sweep.stages);
    for (const search::Stage& stage : sweep.stages) {
      // Neighbours often share their choices.
      if (stage.choices.data() == last) continue;
      last = stage.choices.data();
      if (!counted.insert(last).second) continue;
      bytes +=
          static_cast<int64_t>(stage.choices.size() * sizeof(search::Choice));
    }
  }
  return bytes;
}

}  // namespace

std::string DebugString(const StepKey& key) {
  return absl::StrCat("job '", key.job, "', attempt ", key.attempt, ", step ",
                      key.step, ", replica ", key.replica);
}

int64_t HeldBytes(const SealedPlan& sealed) {
  int64_t bytes = sizeof(SealedPlan) + sealed.plan_bytes.capacity() +
                  VectorBytes(sealed.programs);
  for (const std::string& program : sealed.programs) {
    bytes += program.capacity();
  }
  if (sealed.plan == nullptr) return bytes;
  const search::StepPlan& plan = *sealed.plan;
  return bytes + sizeof(plan) + StepBytes(plan.step) +
         NestedBytes(plan.schedule.ranks) + NestedBytes(plan.times.ranks) +
         NestedBytes(plan.programs.ranks) +
         VectorBytes(plan.programs.transfers);
}

}  // namespace pipeweaver::server
