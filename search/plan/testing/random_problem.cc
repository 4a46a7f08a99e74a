#include "search/plan/testing/random_problem.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/base/check.h"

namespace pipeweaver::search::testing {
namespace {

constexpr int64_t kAmpleBytes = int64_t{1} << 50;

// Small durations, often 0, so that ties are frequent.
int64_t RandomNs(std::mt19937_64& random) {
  return Uniform(random, 0, 3) == 0 ? 0 : Uniform(random, 1, 12);
}

Choice RandomChoice(std::mt19937_64& random, bool frozen) {
  Choice c;
  c.forward_ns = RandomNs(random);
  c.input_grad_ns = RandomNs(random);
  c.weight_grad_ns = frozen ? 0 : std::max<int64_t>(1, RandomNs(random));
  c.activation_bytes = Uniform(random, 0, 40);
  c.backward_bytes = Uniform(random, 0, 60);
  c.weight_grad_bytes = Uniform(random, 0, 40);
  c.fused_backward_bytes = c.backward_bytes;
  if (Uniform(random, 0, 2) == 0) {
    c.fused_backward_ns = RandomNs(random);
    c.fused_backward_bytes = Uniform(random, 0, 60);
  }
  return c;
}

}  // namespace

int64_t Uniform(std::mt19937_64& random, int64_t low, int64_t high) {
  return low +
         static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

StepProblem RandomStepProblem(std::mt19937_64& random) {
  StepProblem step;
  Problem& problem = step.problem;
  problem.ranks = static_cast<int>(Uniform(random, 1, 6));
  problem.split_backward = Uniform(random, 0, 1) == 1;
  problem.memory_limit_bytes.assign(problem.ranks, kAmpleBytes);
  const bool forward_only = Uniform(random, 0, 9) == 0;
  const int modules = static_cast<int>(Uniform(random, 1, 4));
  const int microbatches = static_cast<int>(Uniform(random, 1, 5));

  // Module graph, placement and memory choices.
  std::vector<std::vector<int>> producers(modules);
  std::vector<bool> frozen(modules);
  std::vector<bool> backward(modules);
  std::vector<std::vector<std::vector<int>>> chunk_ranks(modules);
  step.choices.resize(modules);
  for (int m = 0; m < modules; ++m) {
    frozen[m] = Uniform(random, 0, 3) == 0;
    backward[m] = !frozen[m];
    for (int p = 0; p < m; ++p) {
      if (Uniform(random, 0, 1) == 0) continue;
      producers[m].push_back(p);
      backward[m] = backward[m] || backward[p];
    }
    const int segments = static_cast<int>(Uniform(random, 1, 3));
    for (int k = 0; k < segments; ++k) {
      std::vector<int> ranks;
      for (int r = 0; r < problem.ranks; ++r) {
        if (Uniform(random, 0, 4) != 0) ranks.push_back(r);
      }
      if (ranks.empty()) ranks.push_back(0);
      if (Uniform(random, 0, 2) == 0) std::reverse(ranks.begin(), ranks.end());
      auto& segment_choices = step.choices[m].emplace_back();
      for (size_t c = 0; c < ranks.size(); ++c) {
        auto& chunk_choices = segment_choices.emplace_back();
        const int count = static_cast<int>(Uniform(random, 1, 3));
        for (int i = 0; i < count; ++i) {
          MemoryChoice choice;
          choice.name = absl::StrCat("choice", i);
          choice.keep_layers = 1;
          if (Uniform(random, 0, 3) == 0) {
            choice.offload_layers = 1;
            choice.offload_bytes = Uniform(random, 0, 30);
          }
          chunk_choices.push_back(std::move(choice));
        }
      }
      chunk_ranks[m].push_back(std::move(ranks));
    }
  }

  // Sweeps, microbatch by microbatch.
  for (int i = 0; i < microbatches; ++i) {
    // Last sweeps of each module's sub-microbatches.
    std::vector<std::vector<int>> last_sweeps(modules);
    for (int m = 0; m < modules; ++m) {
      const int subs = static_cast<int>(Uniform(random, 0, 3));
      if (subs == 0) step.empty.push_back({i, m});
      for (int j = 0; j < subs; ++j) {
        const int sub = static_cast<int>(step.sub_microbatches.size());
        step.sub_microbatches.push_back({m, i, {j}, Uniform(random, 1, 99)});
        for (size_t k = 0; k < chunk_ranks[m].size(); ++k) {
          Sweep sweep;
          sweep.id = absl::StrCat("mb", i, "/m", m, "/", j, "/", k);
          sweep.microbatch = i;
          sweep.backward = backward[m] && !forward_only;
          step.after_bytes.emplace_back();
          if (k > 0) {
            sweep.after.push_back(static_cast<int>(problem.sweeps.size()) - 1);
            step.after_bytes.back().push_back(Uniform(random, 0, 9));
          } else {
            for (int p : producers[m]) {
              for (int producer : last_sweeps[p]) {
                if (Uniform(random, 0, 2) == 0) continue;
                sweep.after.push_back(producer);
                step.after_bytes.back().push_back(Uniform(random, 0, 9));
              }
            }
          }
          int64_t output_bytes = 0;
          const std::vector<int>& ranks = chunk_ranks[m][k];
          for (size_t c = 0; c < ranks.size(); ++c) {
            Stage stage;
            stage.rank = ranks[c];
            stage.transfer_ns = RandomNs(random);
            const size_t count = step.choices[m][k][c].size();
            for (size_t n = 0; n < count; ++n) {
              stage.choices.Mutable().push_back(
                  RandomChoice(random, frozen[m]));
            }
            sweep.stages.push_back(std::move(stage));
            if (c + 1 < ranks.size()) output_bytes = Uniform(random, 0, 9);
          }
          problem.sweeps.push_back(std::move(sweep));
          step.sweeps.push_back({sub, static_cast<int>(k)});
          step.output_bytes.push_back(output_bytes);
        }
        last_sweeps[m].push_back(static_cast<int>(problem.sweeps.size()) - 1);
      }
    }
  }
  // A problem has at least one sweep.
  if (problem.sweeps.empty()) return RandomStepProblem(random);
  return step;
}

Schedule RandomSchedule(const Problem& problem, std::mt19937_64& random) {
  struct Pair {
    int choice = 0;
    bool splits = false;
    bool fused = false;
    bool forward_done = false;
    bool gradient_done = false;
  };
  const int num_sweeps = static_cast<int>(problem.sweeps.size());
  std::vector<std::vector<Pair>> pairs(num_sweeps);
  std::vector<ScheduledStage> waiting;
  for (int s = 0; s < num_sweeps; ++s) {
    const Sweep& sweep = problem.sweeps[s];
    for (int k = 0; k < static_cast<int>(sweep.stages.size()); ++k) {
      const ChoiceList& choices = sweep.stages[k].choices;
      Pair pair;
      pair.choice = static_cast<int>(
          Uniform(random, 0, static_cast<int64_t>(choices.size()) - 1));
      pair.splits =
          problem.split_backward &&
          std::all_of(choices.begin(), choices.end(),
                      [](const Choice& c) { return c.weight_grad_ns > 0; });
      pair.fused = pair.splits &&
                   choices[pair.choice].fused_backward_ns.has_value() &&
                   Uniform(random, 0, 1) == 0;
      pairs[s].push_back(pair);
      waiting.push_back({StageKind::kForward, s, k, pair.choice});
      if (!sweep.backward) continue;
      if (pair.splits && !pair.fused) {
        waiting.push_back({StageKind::kInputGrad, s, k, pair.choice});
        waiting.push_back({StageKind::kWeightGrad, s, k, pair.choice});
      } else {
        waiting.push_back({StageKind::kBackward, s, k, pair.choice});
      }
    }
  }
  const auto ready = [&](const ScheduledStage& t) {
    const Sweep& sweep = problem.sweeps[t.sweep];
    if (t.kind == StageKind::kForward) {
      if (t.stage > 0) return pairs[t.sweep][t.stage - 1].forward_done;
      for (int producer : sweep.after) {
        if (!pairs[producer].back().forward_done) return false;
      }
      return true;
    }
    if (t.kind == StageKind::kWeightGrad) {
      return pairs[t.sweep][t.stage].gradient_done;
    }
    if (!pairs[t.sweep][t.stage].forward_done) return false;
    if (t.stage + 1 < static_cast<int>(sweep.stages.size())) {
      return pairs[t.sweep][t.stage + 1].gradient_done;
    }
    for (int c = 0; c < num_sweeps; ++c) {
      const auto& after = problem.sweeps[c].after;
      if (std::find(after.begin(), after.end(), t.sweep) != after.end() &&
          !pairs[c].front().gradient_done) {
        return false;
      }
    }
    return true;
  };
  Schedule schedule;
  schedule.ranks.resize(problem.ranks);
  while (!waiting.empty()) {
    // The first ready one from a random place on.
    const size_t from = static_cast<size_t>(
        Uniform(random, 0, static_cast<int64_t>(waiting.size()) - 1));
    size_t i = from;
    while (!ready(waiting[i])) {
      i = (i + 1) % waiting.size();
      PW_CHECK(i != from);
    }
    const ScheduledStage t = waiting[i];
    waiting[i] = waiting.back();
    waiting.pop_back();
    schedule.ranks[problem.sweeps[t.sweep].stages[t.stage].rank].push_back(t);
    Pair& pair = pairs[t.sweep][t.stage];
    if (t.kind == StageKind::kForward) {
      pair.forward_done = true;
    } else if (t.kind != StageKind::kWeightGrad) {
      pair.gradient_done = true;
    }
  }
  return schedule;
}

}  // namespace pipeweaver::search::testing
