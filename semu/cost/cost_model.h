// The one interface behind which costs of layers stand: analytic, measured,
// corrected. Implementations that add to another are decorators on it.

#ifndef SEMU_COST_COST_MODEL_H_
#define SEMU_COST_COST_MODEL_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "semu/model/job.h"

namespace pipeweaver::semu {

// What becomes of a layer's activations between forward and backward, in the
// order in which a chunk's layers choose: first layers first.
enum class MemoryStrategy {
  kOffload,             // copied to the host and back
  kFullRecompute,       // only the input is kept
  kSelectiveRecompute,  // outputs of norms and of the activation are rebuilt
  kKeep,
};
inline constexpr int kNumMemoryStrategies = 4;

// The statistics of items run together that costs depend on.
struct Shape {
  int64_t items = 0;
  int64_t tokens = 0;       // sum of n over the items
  int64_t sum_squares = 0;  // sum of n^2
  int64_t max_tokens = 0;   // largest n
  // For layers with a condition: sum of m over the items, m being the tokens
  // that an item consumes, and sum of n * m.
  int64_t condition_tokens = 0;
  int64_t condition_products = 0;

  auto operator<=>(const Shape&) const = default;
};

// What a layer runs on.
struct Platform {
  Parallelism parallelism;
  DataType data_type = DataType::kBf16;
  Device device;
  Links links;
};

Platform PlatformOf(const Job& job);

// Whether a layer of the kind hands a gradient on: not where its inputs are
// indices or pixels.
constexpr bool TakesInputGrad(LayerKind kind) {
  return kind != LayerKind::kEmbedding && kind != LayerKind::kPatchEmbed;
}

struct LayerQuery {
  LayerSpec layer;
  Shape shape;
  // The layer is trained.
  bool weight_grad = true;
  // A gradient of the layer's input is wanted.
  bool input_grad = true;
};

// The most that a time or a size of a cost may be.
inline constexpr int64_t kMaxCost = 100'000'000'000'000;

// Cost of one layer under one strategy. Bytes are per GPU; times are of the
// GPUs of a rank, which act as one. All values are 0 .. kMaxCost.
struct StrategyCost {
  int64_t forward_ns = 0;
  int64_t input_grad_ns = 0;  // rebuilding activations included
  int64_t weight_grad_ns = 0;
  // Input and weight gradients in one go, where that is not the sum.
  std::optional<int64_t> fused_backward_ns;
  // Held from the forward to the backward.
  int64_t kept_bytes = 0;
  // Added when the backward reaches the layer: rebuilt or copied back. With
  // kept bytes they are all that the layer's backward reads.
  int64_t rebuilt_bytes = 0;
  // Live only while the layer's backward runs.
  int64_t workspace_bytes = 0;
  // Of kept and rebuilt bytes and of gradients, what the weight gradient reads:
  // live from the end of the layer's input gradient to the weight gradient.
  int64_t weight_grad_bytes = 0;
  // Copied to the host, and back.
  int64_t copy_bytes = 0;
};

struct LayerCost {
  std::array<StrategyCost, kNumMemoryStrategies> strategies;
  // Live while the forward runs, besides the layer's input.
  int64_t forward_bytes = 0;
  // Time to copy copy_bytes one way.
  int64_t copy_ns = 0;
  // What is handed to the next layer, and the gradient that answers.
  int64_t output_bytes = 0;
  // The times come from measurements.
  bool measured = false;

  const StrategyCost& operator[](MemoryStrategy strategy) const {
    return strategies[static_cast<int>(strategy)];
  }
};

// Implementations are immutable and thread-safe.
class CostModel {
 public:
  virtual ~CostModel() = default;

  // A pure function of its arguments and of Fingerprint().
  virtual LayerCost Cost(const Platform& platform,
                         const LayerQuery& query) const = 0;

  // Cost of each query. Models for which many at once are cheaper override it.
  virtual std::vector<LayerCost> CostAll(
      const Platform& platform, absl::Span<const LayerQuery> queries) const;

  // Bytes that tell this model's costs from any other's: what a plan's
  // profile_digest is the SHA-256 of.
  virtual std::string Fingerprint() const = 0;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_COST_MODEL_H_
