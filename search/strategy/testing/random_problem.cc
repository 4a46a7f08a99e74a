// Random small problems; see random_problem.h.

#include "search/strategy/testing/random_problem.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "search/problem/problem.h"

namespace pipeweaver::search {

uint64_t FuzzProblems() {
  const char* text = std::getenv("PIPEWEAVER_FUZZ_PROBLEMS");
  return text == nullptr ? 400 : std::strtoull(text, nullptr, 10);
}

Problem RandomProblem(uint64_t seed, const RandomProblemOptions& options) {
  std::mt19937_64 random(seed);
  const auto below = [&random](int64_t bound) {
    return static_cast<int64_t>(random() % static_cast<uint64_t>(bound));
  };
  const auto chance = [&below](int percent) { return below(100) < percent; };

  Problem problem;
  problem.ranks = static_cast<int>(1 + below(options.most_ranks));
  problem.split_backward = chance(60);
  const bool zero_times = chance(25), zero_transfers = chance(40);
  const bool frozen = chance(25), uniform = chance(20);
  const int64_t longest = chance(50) ? 9 : 3;
  const auto time = [&] {
    return zero_times && chance(30) ? 0 : 1 + below(longest);
  };
  int pairs = static_cast<int>(1 + below(options.most_pairs));
  while (pairs > 0) {
    Sweep sweep;
    const int s = static_cast<int>(problem.sweeps.size());
    sweep.id = absl::StrCat("s", s);
    sweep.microbatch = s;
    const int stages = static_cast<int>(1 + below(std::min(pairs, 3)));
    pairs -= stages;
    sweep.backward = !(frozen && chance(50));
    for (int before = 0; before < s; ++before) {
      if (!chance(35)) continue;
      if (problem.sweeps[before].backward && !sweep.backward) continue;
      sweep.after.push_back(before);
    }
    const bool forth = chance(50);
    for (int k = 0; k < stages; ++k) {
      Stage stage;
      stage.rank = chance(70) ? (forth ? k : stages - 1 - k) % problem.ranks
                              : static_cast<int>(below(problem.ranks));
      stage.transfer_ns = zero_transfers ? 0 : below(4);
      const int choices = static_cast<int>(1 + below(options.most_choices));
      for (int c = 0; c < choices; ++c) {
        Choice choice;
        choice.forward_ns = uniform ? 2 : time();
        choice.input_grad_ns = uniform ? 2 : time();
        choice.weight_grad_ns = uniform ? 2 : time();
        choice.activation_bytes = below(6);
        choice.backward_bytes = chance(50) ? choice.activation_bytes : below(8);
        choice.weight_grad_bytes =
            chance(50) ? choice.activation_bytes : below(8);
        choice.fused_backward_bytes =
            chance(50) ? choice.backward_bytes : below(8);
        if (chance(40)) {
          choice.fused_backward_ns = std::max<int64_t>(
              0, choice.input_grad_ns + choice.weight_grad_ns + below(5) - 2);
        }
        stage.choices.Mutable().push_back(choice);
      }
      sweep.stages.push_back(std::move(stage));
    }
    problem.sweeps.push_back(std::move(sweep));
  }
  const int64_t memory = chance(40) ? 100 : 4 + below(12);
  for (int r = 0; r < problem.ranks; ++r) {
    problem.memory_limit_bytes.push_back(chance(3) ? below(3)
                                                   : memory + below(3));
  }
  return problem;
}

}  // namespace pipeweaver::search
