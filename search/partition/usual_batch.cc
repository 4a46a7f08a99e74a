// Items of usual length, as many as there is room for.

#include "search/partition/usual_batch.h"

#include <algorithm>
#include <optional>
#include <random>
#include <utility>
#include <vector>

#include "search/partition/batch_split.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Job;
using semu::Modality;
using semu::Shape;

constexpr int64_t kMostUsualItems = 256;

// The module whose items `module` takes over, or itself.
int ItemSource(const Job& job, int module) {
  for (int e; (e = semu::InheritedEdge(job, module)) >= 0;) {
    module = job.edges[e].producer;
  }
  return module;
}

// Gives every module counts[m] items of length[m] tokens and spreads producers'
// items evenly over consumers'. Where items are left over that must be
// consumed, lowers their source's count and returns none.
std::optional<semu::Microbatch> Fill(const Job& job,
                                     const std::vector<int64_t>& length,
                                     std::vector<int>* counts) {
  semu::Microbatch microbatch;
  microbatch.item_tokens.resize(job.modules.size());
  microbatch.uses.resize(job.edges.size());
  for (int m : semu::TopologicalOrder(job)) {
    std::vector<int64_t>& tokens = microbatch.item_tokens[m];
    const int inherited = semu::InheritedEdge(job, m);
    if (inherited < 0) {
      tokens.assign((*counts)[m], length[m]);
      continue;
    }
    const semu::ModuleEdge& edge = job.edges[inherited];
    for (int64_t n : microbatch.item_tokens[edge.producer]) {
      const int i = static_cast<int>(tokens.size());
      tokens.push_back(CrossingTokens(edge, n));
      microbatch.uses[inherited].push_back({i, i});
    }
  }
  std::vector<std::vector<int64_t>> room = microbatch.item_tokens;
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const std::vector<int64_t>& items = microbatch.item_tokens[m];
    size_t most_used = 0;
    bool has_consumers = false;
    for (size_t e = 0; e < job.edges.size(); ++e) {
      const semu::ModuleEdge& edge = job.edges[e];
      if (edge.producer != static_cast<int>(m)) continue;
      has_consumers = true;
      std::vector<semu::ItemUse>& uses = microbatch.uses[e];
      const size_t consumers = room[edge.consumer].size();
      const bool bounded = !semu::IsConditioned(job.modules[edge.consumer]);
      if (semu::InheritedEdge(job, edge.consumer) < 0) {
        for (size_t i = 0; i < items.size() && consumers > 0; ++i) {
          const int64_t need = CrossingTokens(edge, items[i]);
          const size_t first = i * consumers / items.size();
          for (size_t k = 0; k < consumers; ++k) {
            const size_t c = (first + k) % consumers;
            if (bounded && room[edge.consumer][c] < need) continue;
            room[edge.consumer][c] -= bounded ? need : 0;
            uses.push_back({static_cast<int>(i), static_cast<int>(c)});
            break;
          }
        }
      }
      most_used = std::max(most_used, uses.size());
    }
    if (has_consumers && most_used < items.size() &&
        !semu::HasLoss(job.modules[m])) {
      (*counts)[ItemSource(job, static_cast<int>(m))] =
          static_cast<int>(most_used);
      return std::nullopt;
    }
  }
  return microbatch;
}

// What a microbatch has of a module's items: their length in tokens, and the
// share of the module's room that they fill, in 1/kFull.
struct Filling {
  int64_t length = 1;
  int share = 0;
};
constexpr int kFull = 8;

// Modules with a consumer in common share their room in equal parts.
semu::Microbatch FilledMicrobatch(const Job& job,
                                  const std::vector<Filling>& fillings) {
  std::vector<int> producers(job.modules.size(), 0);  // of each module
  for (const semu::ModuleEdge& edge : job.edges) ++producers[edge.consumer];
  // [module]: most producers of any module that its items end in.
  std::vector<int> sharing(job.modules.size(), 0);
  const std::vector<int> order = semu::TopologicalOrder(job);
  for (auto m = order.rbegin(); m != order.rend(); ++m) {
    for (const semu::ModuleEdge& edge : job.edges) {
      if (edge.producer != *m) continue;
      const bool inherited = semu::InheritedEdge(job, edge.consumer) >= 0;
      sharing[*m] = std::max(sharing[*m], inherited ? sharing[edge.consumer]
                                                    : producers[edge.consumer]);
    }
  }
  std::vector<int> counts;
  std::vector<int64_t> length;
  for (size_t m = 0; m < job.modules.size(); ++m) {
    const Filling& filling = fillings[m];
    const int64_t full = job.max_microbatch_tokens[m] / filling.length;
    const int64_t count =
        full * filling.share / (kFull * std::max(1, sharing[m]));
    counts.push_back(
        static_cast<int>(std::clamp<int64_t>(count, 1, kMostUsualItems)));
    length.push_back(filling.length);
  }
  // Each round that fails lowers a count.
  for (;;) {
    std::optional<semu::Microbatch> microbatch = Fill(job, length, &counts);
    if (microbatch.has_value()) return *std::move(microbatch);
  }
}

bool IsConsumed(const Job& job, int module) {
  return std::any_of(
      job.edges.begin(), job.edges.end(),
      [module](const semu::ModuleEdge& e) { return e.producer == module; });
}

}  // namespace

int64_t UsualItemTokens(const Job& job, int module) {
  const semu::Module& m = job.modules[module];
  const semu::TokenGrid& grid = m.token_grid;
  const auto grid_tokens = [&grid](int64_t pixels, int64_t frames) {
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    return ceil_div(pixels, grid.pixels_per_token_height) *
           ceil_div(pixels, grid.pixels_per_token_width) *
           ceil_div(frames, grid.frames_per_token);
  };
  int64_t tokens = 1024;
  switch (m.modality) {
    case Modality::kText:
      break;
    case Modality::kImage:
      if (grid.pixels_per_token_height > 0) tokens = grid_tokens(728, 1);
      break;
    case Modality::kVideo:
      if (grid.pixels_per_token_height > 0) tokens = grid_tokens(768, 32);
      break;
    case Modality::kAudio:
      tokens = 200;
      break;
    case Modality::kInherited: {
      const semu::ModuleEdge& edge =
          job.edges[semu::InheritedEdge(job, module)];
      tokens = UsualItemTokens(job, edge.producer) / edge.tokens_merged;
      break;
    }
  }
  return std::clamp<int64_t>(tokens, 1, job.max_microbatch_tokens[module]);
}

Shape UsualShape(const Job& job, int module, int64_t tokens) {
  const int64_t item = std::min(tokens, UsualItemTokens(job, module));
  Shape shape;
  shape.items = tokens / item;
  const int64_t rest = tokens - shape.items * item;
  shape.tokens = tokens;
  shape.sum_squares = shape.items * item * item + rest * rest;
  shape.max_tokens = item;
  if (rest > 0) ++shape.items;
  if (semu::IsConditioned(job.modules[module])) {
    // A prompt of 256 tokens an item.
    shape.condition_tokens = 256 * shape.items;
    shape.condition_products = 256 * shape.tokens;
  }
  return shape;
}

semu::Batch UsualBatch(const Job& job, int microbatches) {
  semu::Batch batch;
  for (int b = 0; b < microbatches; ++b) {
    std::vector<Filling> fillings;
    for (int m = 0; m < static_cast<int>(job.modules.size()); ++m) {
      const int share = IsConsumed(job, m) ? (b % 4 + 1) * kFull / 4 : kFull;
      fillings.push_back({UsualItemTokens(job, m), share});
    }
    batch.microbatches.push_back(FilledMicrobatch(job, fillings));
  }
  return batch;
}

semu::Batch VariedBatch(const Job& job, int microbatches, uint64_t seed) {
  std::mt19937_64 random(seed);
  const auto draw = [&random](int least, int most) {
    return least + static_cast<int>(random() % (most - least + 1));
  };
  semu::Batch batch;
  for (int b = 0; b < microbatches; ++b) {
    std::vector<Filling> fillings;
    for (int m = 0; m < static_cast<int>(job.modules.size()); ++m) {
      const int64_t length = UsualItemTokens(job, m) * draw(4, 12) / 8;
      fillings.push_back(
          {std::clamp<int64_t>(length, 1, job.max_microbatch_tokens[m]),
           draw(IsConsumed(job, m) ? 0 : kFull / 2, kFull)});
    }
    batch.microbatches.push_back(FilledMicrobatch(job, fillings));
  }
  return batch;
}

}  // namespace pipeweaver::search
