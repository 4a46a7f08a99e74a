// The scheduling problem: what the search solves once shapes, profile and
// layout have become durations and bytes. The file form of this value is
// documented with the reader, search/problem/problem_json.h.

#ifndef SEARCH_PROBLEM_PROBLEM_H_
#define SEARCH_PROBLEM_PROBLEM_H_

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/strings/string_view.h"

namespace pipeweaver::search {

// One way to run a stage pair (a forward with its backward): a trade of time
// for memory. All values are >= 0. There are many: its name stands apart, in
// the ChoiceList.
struct Choice {
  int64_t forward_ns = 0;
  int64_t input_grad_ns = 0;
  int64_t weight_grad_ns = 0;
  // Length of one backward in place of input_grad_ns and weight_grad_ns, where
  // the stage allows it.
  std::optional<int64_t> fused_backward_ns;
  // Held from the forward's start until the backward's start.
  int64_t activation_bytes = 0;
  // Held instead while the backward or input gradient runs.
  int64_t backward_bytes = 0;
  // Held from the input gradient's end to the weight gradient's end.
  int64_t weight_grad_bytes = 0;
  // In place of backward_bytes while a fused backward runs.
  int64_t fused_backward_bytes = 0;
  // What of forward_ns, of input_grad_ns, and of a backward in one piece, the
  // stage does not compute, but waits for a copy to or from the host that runs
  // beside it; an emulation that counts copies by themselves leaves it out.
  int64_t forward_copy_wait_ns = 0;
  int64_t input_grad_copy_wait_ns = 0;
  int64_t backward_copy_wait_ns = 0;
};

using ChoiceNames = std::shared_ptr<const std::vector<std::string>>;

// The choices of a stage. Copies share their elements until one of them is
// changed: most stages of a step are alike.
class ChoiceList {
 public:
  ChoiceList() = default;
  // `names`: of the first so many; null: none has one.
  ChoiceList(std::vector<Choice> choices, ChoiceNames names = nullptr)
      : shared_(std::make_shared<Shared>(
            Shared{std::move(choices), std::move(names)})) {}
  ChoiceList(std::initializer_list<Choice> choices)
      : ChoiceList(std::vector<Choice>(choices)) {}

  size_t size() const {
    return shared_ == nullptr ? 0 : shared_->choices.size();
  }
  bool empty() const { return size() == 0; }
  const Choice* data() const {
    return shared_ == nullptr ? nullptr : shared_->choices.data();
  }
  const Choice* begin() const { return data(); }
  const Choice* end() const { return data() + size(); }
  const Choice& operator[](size_t i) const { return data()[i]; }
  const Choice& front() const { return *data(); }
  const Choice& back() const { return end()[-1]; }
  // Empty: it has none.
  absl::string_view name(size_t i) const {
    return shared_->names == nullptr || i >= shared_->names->size()
               ? absl::string_view()
               : (*shared_->names)[i];
  }

  // To be changed; of this list alone. Valid until the list is copied.
  std::vector<Choice>& Mutable() {
    if (shared_ == nullptr) {
      shared_ = std::make_shared<Shared>();
    } else if (shared_.use_count() > 1) {
      shared_ = std::make_shared<Shared>(*shared_);
    }
    return shared_->choices;
  }

 private:
  struct Shared {
    std::vector<Choice> choices;
    ChoiceNames names;
  };
  std::shared_ptr<Shared> shared_;
};

// One model chunk of a sweep: a stage pair still to be scheduled.
struct Stage {
  int rank = 0;
  // Time for the stage's output to reach another rank, and for the gradient
  // that answers it to come back; 0 on the same rank.
  int64_t transfer_ns = 0;
  ChoiceList choices;  // never empty
};

// One pipeline segment run on one sub-microbatch: its forwards run in the order
// of `stages`, its backwards in reverse.
struct Sweep {
  std::string id;
  int microbatch = 0;  // a hint; the dependencies are in `after`
  bool backward = true;
  // Indices of the sweeps whose last forward the first forward waits for; their
  // last stage's backward waits for this sweep's first. Without repeats.
  absl::InlinedVector<int, 4> after;
  std::vector<Stage> stages;  // never empty
};

struct Problem {
  int ranks = 0;
  // Backward may be split in input gradient and weight gradient.
  bool split_backward = false;
  std::vector<int64_t> memory_limit_bytes;  // one a rank
  std::vector<Sweep> sweeps;
};

}  // namespace pipeweaver::search

#endif  // SEARCH_PROBLEM_PROBLEM_H_
