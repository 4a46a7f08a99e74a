// A stage's layers are cut into pieces of equal layers under one strategy; sums
// and peaks go over the pieces.

#include "search/partition/stage_cost.h"

#include <algorithm>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "semu/base/check.h"

namespace pipeweaver::search {
namespace {

using semu::LayerCost;
using semu::MemoryStrategy;
using semu::StrategyCost;

constexpr int kMostLayersBySingleSteps = 32;

int NumLayers(absl::Span<const LayerRun> runs) {
  int layers = 0;
  for (const LayerRun& run : runs) layers += run.count;
  return layers;
}

// One strategy's name, or counts by first letters, such as "f3k5".
std::string NameOf(const MemoryChoice& choice) {
  const std::pair<int, absl::string_view> parts[] = {
      {choice.offload_layers, "offload"},
      {choice.full_recompute_layers, "full"},
      {choice.selective_recompute_layers, "selective"},
      {choice.keep_layers, "keep"}};
  std::string counts;
  absl::string_view only = "keep";
  int used = 0;
  for (const auto& [count, name] : parts) {
    if (count == 0) continue;
    ++used;
    only = name;
    absl::StrAppend(&counts, name.substr(0, 1), count);
  }
  return used > 1 ? counts : std::string(only);
}

}  // namespace

int64_t OffloadBytes(absl::Span<const LayerPiece> pieces,
                     absl::Span<const LayerCost> costs) {
  int64_t bytes = 0;
  for (const LayerPiece& piece : pieces) {
    bytes += piece.count * costs[piece.group][piece.strategy].copy_bytes;
  }
  return bytes;
}

LayerPieces PiecesOf(absl::Span<const LayerRun> runs,
                     const MemoryChoice& choice) {
  const int left_by_strategy[] = {
      choice.offload_layers, choice.full_recompute_layers,
      choice.selective_recompute_layers, choice.keep_layers};
  LayerPieces pieces;
  int strategy = 0;
  int left = left_by_strategy[0];
  for (const LayerRun& run : runs) {
    int count = run.count;
    while (count > 0) {
      while (left == 0) {
        ++strategy;
        PW_CHECK(strategy < semu::kNumMemoryStrategies);
        left = left_by_strategy[strategy];
      }
      const int taken = std::min(count, left);
      pieces.push_back(
          {run.group, static_cast<MemoryStrategy>(strategy), taken});
      count -= taken;
      left -= taken;
    }
  }
  return pieces;
}

std::vector<LayerRun> RunsOf(const semu::Module& module,
                             const semu::Chunk& chunk) {
  std::vector<LayerRun> runs;
  int first = 0;
  const int end = chunk.first_layer + chunk.num_layers;
  for (size_t g = 0; g < module.layers.size(); ++g) {
    const int last = first + module.layers[g].count;
    const int count = std::min(last, end) - std::max(first, chunk.first_layer);
    if (count > 0) runs.push_back({static_cast<int>(g), count});
    first = last;
  }
  PW_CHECK(NumLayers(runs) == chunk.num_layers);
  return runs;
}

Choice StageChoice(absl::Span<const LayerPiece> pieces,
                   absl::Span<const LayerCost> costs, const StageMode& mode) {
  Choice result;
  SetStageChoice(pieces, costs, mode, &result);
  return result;
}

void SetStageChoice(absl::Span<const LayerPiece> pieces,
                    absl::Span<const LayerCost> costs, const StageMode& mode,
                    Choice* result) {
  int64_t forward_ns = 0;
  int64_t input_grad_ns = 0;
  int64_t weight_grad_ns = 0;
  int64_t fused_ns = 0;
  int64_t activation_bytes = 0;
  int64_t weight_grad_bytes = 0;
  int64_t forward_peak = 0;
  int64_t copied_bytes = 0;
  int64_t copy_ns = 0;
  for (const LayerPiece& piece : pieces) {
    const LayerCost& layer = costs[piece.group];
    const StrategyCost& cost = layer[piece.strategy];
    forward_ns += piece.count * cost.forward_ns;
    input_grad_ns += piece.count * cost.input_grad_ns;
    weight_grad_ns += piece.count * cost.weight_grad_ns;
    fused_ns += piece.count * cost.fused_backward_ns.value_or(
                                  cost.input_grad_ns + cost.weight_grad_ns);
    activation_bytes += piece.count * cost.kept_bytes;
    weight_grad_bytes += piece.count * cost.weight_grad_bytes;
    copied_bytes += piece.count * cost.copy_bytes;
    if (cost.copy_bytes > 0) copy_ns += piece.count * layer.copy_ns;
    forward_peak =
        std::max(forward_peak, layer.forward_bytes + layer.output_bytes);
  }
  if (!mode.backward) {
    result->forward_ns = forward_ns;
    result->activation_bytes = forward_peak;
    return;
  }

  int64_t held_below = activation_bytes + copied_bytes;
  int64_t weight_grad_above = 0;
  int64_t input_grad_peak = weight_grad_bytes;
  int64_t fused_peak = 0;
  for (auto piece = pieces.rbegin(); piece != pieces.rend(); ++piece) {
    const StrategyCost& cost = costs[piece->group][piece->strategy];
    const int64_t own =
        cost.workspace_bytes + (cost.copy_bytes > 0 ? 0 : cost.rebuilt_bytes);
    // At the piece's last layer all its layers are held; at its first one, all
    // others have been turned into what the weight gradient reads. Between,
    // memory is linear.
    const int64_t at_last = held_below + own + weight_grad_above;
    fused_peak = std::max(fused_peak, held_below + own);
    const int64_t held = cost.kept_bytes + cost.copy_bytes;
    held_below -= piece->count * held;
    weight_grad_above += (piece->count - 1) * cost.weight_grad_bytes;
    const int64_t at_first = held_below + held + own + weight_grad_above;
    weight_grad_above += cost.weight_grad_bytes;
    input_grad_peak = std::max({input_grad_peak, at_last, at_first});
  }

  const auto wait_for_copy = [copy_ns](int64_t& length_ns) {
    const int64_t wait_ns = std::max<int64_t>(0, copy_ns - length_ns);
    length_ns += wait_ns;
    return wait_ns;
  };
  result->forward_copy_wait_ns = wait_for_copy(forward_ns);
  result->backward_copy_wait_ns = wait_for_copy(fused_ns);
  const bool split = mode.split_backward && weight_grad_ns > 0;
  if (split) {
    result->input_grad_copy_wait_ns = wait_for_copy(input_grad_ns);
    result->fused_backward_ns = fused_ns;
    result->backward_bytes = input_grad_peak;
  } else {
    // One backward, as long as both gradients in one piece.
    weight_grad_ns = std::min(weight_grad_ns, fused_ns);
    input_grad_ns = fused_ns - weight_grad_ns;
    result->backward_bytes = fused_peak;
  }
  result->forward_ns = forward_ns;
  result->input_grad_ns = input_grad_ns;
  result->weight_grad_ns = weight_grad_ns;
  result->activation_bytes = activation_bytes;
  result->weight_grad_bytes = weight_grad_bytes;
  result->fused_backward_bytes = fused_peak;
}

MemoryChoice UniformChoice(absl::Span<const LayerRun> runs,
                           MemoryStrategy strategy) {
  MemoryChoice choice;
  const int layers = NumLayers(runs);
  switch (strategy) {
    case MemoryStrategy::kOffload:
      choice.offload_layers = layers;
      break;
    case MemoryStrategy::kFullRecompute:
      choice.full_recompute_layers = layers;
      break;
    case MemoryStrategy::kSelectiveRecompute:
      choice.selective_recompute_layers = layers;
      break;
    case MemoryStrategy::kKeep:
      choice.keep_layers = layers;
      break;
  }
  choice.name = NameOf(choice);
  return choice;
}

std::vector<MemoryChoice> UniformChoices(
    absl::Span<const LayerRun> runs,
    const semu::ExecutorCapabilities& executor) {
  const std::pair<bool, MemoryStrategy> strategies[] = {
      {true, MemoryStrategy::kKeep},
      {executor.selective_recompute, MemoryStrategy::kSelectiveRecompute},
      {executor.full_recompute, MemoryStrategy::kFullRecompute}};
  std::vector<MemoryChoice> choices;
  for (const auto& [has, strategy] : strategies) {
    if (has) choices.push_back(UniformChoice(runs, strategy));
  }
  return choices;
}

std::vector<MemoryChoice> CandidateChoices(
    absl::Span<const LayerRun> runs, absl::Span<const LayerCost> costs,
    const semu::ExecutorCapabilities& executor, int most) {
  PW_CHECK(most >= 2);
  const int layers = NumLayers(runs);
  const int step =
      (layers + kMostLayersBySingleSteps - 1) / kMostLayersBySingleSteps;
  struct Candidate {
    int64_t ns = 0;
    int64_t bytes = 0;
    MemoryChoice choice;
  };
  // Least time for each size, found in a fixed order: the first of equals
  // stays.
  std::map<int64_t, Candidate> by_bytes;
  const auto next = [step](int count, int limit) {
    return count == limit ? limit + 1 : std::min(count + step, limit);
  };
  for (int o = 0; o <= (executor.offload ? layers : 0); o = next(o, layers)) {
    const int after_offload = layers - o;
    for (int f = 0; f <= (executor.full_recompute ? after_offload : 0);
         f = next(f, after_offload)) {
      const int after_full = after_offload - f;
      for (int s = 0; s <= (executor.selective_recompute ? after_full : 0);
           s = next(s, after_full)) {
        MemoryChoice choice;
        choice.offload_layers = o;
        choice.full_recompute_layers = f;
        choice.selective_recompute_layers = s;
        choice.keep_layers = after_full - s;
        const Choice cost =
            StageChoice(PiecesOf(runs, choice), costs, StageMode{});
        const int64_t ns =
            cost.forward_ns + cost.input_grad_ns + cost.weight_grad_ns;
        const auto [it, inserted] = by_bytes.try_emplace(cost.activation_bytes);
        if (inserted || ns < it->second.ns) {
          it->second = {ns, cost.activation_bytes, choice};
        }
      }
    }
  }
  // From lean to rich, those that are faster than all leaner ones.
  std::vector<Candidate> front;
  for (const auto& [bytes, candidate] : by_bytes) {
    if (front.empty() || candidate.ns < front.back().ns) {
      front.push_back(candidate);
    }
  }
  const int64_t least = front.front().bytes;
  const int64_t range = front.back().bytes - least;
  std::vector<MemoryChoice> result = {front.back().choice};
  int band_below = most - 2;  // bands are taken from rich to lean
  for (int i = static_cast<int>(front.size()) - 2; i > 0; --i) {
    const int band =
        static_cast<int>(static_cast<double>(front[i].bytes - least) /
                         (static_cast<double>(range) + 1.0) * (most - 2));
    if (band >= band_below) continue;
    band_below = band;
    result.push_back(front[i].choice);
  }
  if (front.size() > 1) result.push_back(front.front().choice);
  for (MemoryChoice& choice : result) choice.name = NameOf(choice);
  return result;
}

}  // namespace pipeweaver::search
