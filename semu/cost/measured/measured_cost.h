// Layer costs from measured layers: a decorator on any cost model.

#ifndef SEMU_COST_MEASURED_MEASURED_COST_H_
#define SEMU_COST_MEASURED_MEASURED_COST_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "semu/cost/cost_model.h"

namespace pipeweaver::semu {

enum class MeasuredPass { kForward, kBackward, kInputGrad, kWeightGrad };
inline constexpr int kNumMeasuredPasses = 4;

// Time of one pass of one layer, nothing recomputed or offloaded, on a device
// like the one asked about.
struct MeasuredLayer {
  LayerSpec layer;
  int tensor_parallel = 1;
  int context_parallel = 1;
  MeasuredPass pass = MeasuredPass::kForward;
  Shape shape;
  int64_t ns = 0;
  // How many times it was measured, >= 1: its weight.
  int64_t count = 1;
};

// Orders by what was measured (layer, parallelism, pass, shape), not by how
// long it took.
struct MeasuredBefore {
  bool operator()(const MeasuredLayer& a, const MeasuredLayer& b) const;
};

// Takes the base's cost and multiplies its times by measured over predicted, as
// known at the measured shapes of the same layer, pass and parallelism; between
// two of them the ratio is interpolated in the logarithm of tokens, so that the
// base carries what changes with the shape (attention grows with squares) and
// the measurements carry what the base cannot know. Outside the measured range
// the nearest ratio holds, and the cost does not count as measured. A pass
// without a measurement keeps the base's time; backward stands in for input and
// weight gradient where those were not measured apart.
//
// Of points of equal tokens, the one whose items attend to a condition of the
// most like length is taken. A point that says nothing of the condition
// (condition_products 0) is taken to have had the asked shape's length, and
// stands behind points that say.
//
// LayerCost::measured: every pass that the query asks for lies within measured
// shapes, in tokens and in the condition's length. Immutable and thread-safe.
class MeasuredCost : public CostModel {
 public:
  // `base` must outlive the model. Points without tokens or time (> 0) are left
  // out; of points at equal shapes the mean is taken, weighted by count.
  MeasuredCost(const CostModel& base, std::vector<MeasuredLayer> points);

  LayerCost Cost(const Platform& platform,
                 const LayerQuery& query) const override;
  std::vector<LayerCost> CostAll(
      const Platform& platform,
      absl::Span<const LayerQuery> queries) const override;
  std::string Fingerprint() const override;

  // As held: ordered, of equal shapes one.
  const std::vector<MeasuredLayer>& points() const { return points_; }

  // What this model holds a point's time to be, were it asked: nanoseconds on
  // `platform` with the point's parallelism. nullopt: the point lies outside
  // what was measured.
  std::optional<int64_t> PredictNs(const Platform& platform,
                                   const MeasuredLayer& point) const;

 private:
  struct Ratio {
    double value = 1;
    bool known = false;
    // Between measured shapes, or at one.
    bool inside = false;
  };
  void Correct(const Platform& platform, const LayerQuery& query,
               LayerCost* cost) const;
  Ratio RatioAt(const Platform& platform, const LayerQuery& query,
                MeasuredPass pass) const;

  const CostModel& base_;
  // Ordered by layer, parallelism, pass, tokens.
  const std::vector<MeasuredLayer> points_;
};

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_MEASURED_MEASURED_COST_H_
