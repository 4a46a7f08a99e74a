// Split, cost, choose candidates, then write one sweep after the other.

#include "search/partition/step_problem_builder.h"

#include <algorithm>
#include <cstddef>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
#include "absl/strings/str_cat.h"
#include "search/partition/batch_split.h"
#include "search/partition/memory_plan.h"
#include "search/partition/stage_cost.h"
#include "search/strategy/worker_pool.h"
#include "semu/base/check.h"
#include "semu/base/status_macros.h"
#include "semu/cost/links.h"
#include "semu/model/layer_size.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::search {
namespace {

using semu::Batch;
using semu::Job;
using semu::LayerCost;
using semu::Layout;
using semu::MemoryStrategy;
using semu::Shape;

constexpr int64_t kMaxStages = int64_t{1} << 20;
constexpr double kMaxSum = 4.6e18;  // 2^62

// A chunk of the layout, flattened.
struct ChunkInfo {
  int rank = 0;
  int runs = 0;  // index into the module's distinct runs
};

// A module as the builder sees it.
struct ModuleInfo {
  StageMode mode;
  semu::LayerQuery query;  // all but layer and shape
  // Chunks with equal runs cost the same; they share an entry.
  std::vector<std::vector<LayerRun>> runs;
  // [runs]: that keeps everything, and the layers under it.
  std::vector<MemoryChoice> keep;
  std::vector<LayerPieces> keep_pieces;
  std::vector<std::vector<ChunkInfo>> segments;
  // [runs]: choices, their names, the layers under each, and whether any chunk
  // of these runs needs more than "keep".
  std::vector<std::vector<MemoryChoice>> candidates;
  std::vector<ChoiceNames> candidate_names;
  std::vector<std::vector<LayerPieces>> candidate_pieces;
  std::vector<bool> needs_choices;
};

// What one stage adds to the sums over all.
struct StageSums {
  double longest_ns = 0;
  double most_bytes = 0;
  double layer_ns = 0;
  double measured_ns = 0;

  void operator+=(const StageSums& other) {
    longest_ns += other.longest_ns;
    most_bytes += other.most_bytes;
    layer_ns += other.layer_ns;
    measured_ns += other.measured_ns;
  }
};

// One for each of a module's distinct runs, most often few.
template <typename T>
using PerRuns = absl::InlinedVector<T, 4>;

// Costs of a module at one shape.
struct ShapeCosts {
  int module = 0;
  Shape shape;
  absl::Span<const LayerCost> layers;  // [group]
  int64_t output_bytes = 0;            // between layers
  PerRuns<int64_t> richest_bytes;      // most held where all is kept
  PerRuns<ChoiceList> choices;
  PerRuns<StageSums> sums;
};

// Where a microbatch begins.
struct MicrobatchStart {
  int sub = 0;    // index into StepProblem::sub_microbatches
  int sweep = 0;  // index into Problem::sweeps
};

// What writing a microbatch's sweeps tells of the whole step.
struct WrittenMicrobatch {
  StageSums sums;  // transfers included
  std::vector<int> empty_modules;
};

// Bytes per GPU that cross the module graph's edges between two
// sub-microbatches.
struct EdgeInput {
  int consumer = 0;
  int producer = 0;
  int64_t bytes = 0;

  static bool Before(const EdgeInput& a, const EdgeInput& b) {
    return std::pair(a.consumer, a.producer) <
           std::pair(b.consumer, b.producer);
  }
};

class Builder {
 public:
  Builder(const Job& job, const Layout& layout,
          absl::Span<const int64_t> memory_limit_bytes, const Batch& batch,
          const semu::CostModel& costs, const StepProblemOptions& options)
      : job_(job),
        layout_(layout),
        limits_(memory_limit_bytes.begin(), memory_limit_bytes.end()),
        batch_(batch),
        costs_(costs),
        options_(options),
        platform_(semu::PlatformOf(job)),
        gpus_(int64_t{job.parallelism.tensor_parallel} *
              job.parallelism.context_parallel) {
    PW_CHECK(limits_.size() ==
             static_cast<size_t>(job.parallelism.pipeline_parallel));
    PW_CHECK(layout.modules.size() == job.modules.size());
  }

  absl::StatusOr<StepProblem> Run() {
    PW_ASSIGN_OR_RETURN(step_.sub_microbatches,
                        SplitBatch(job_, layout_, batch_, options_.pool));
    DescribeModules();
    PW_RETURN_IF_ERROR(CheckStageCount());
    FindShapes();
    CostShapes();
    SetAsideForLongItems();
    DecideWhoNeedsChoices();
    FindChoices();
    WriteSweeps();
    PW_RETURN_IF_ERROR(CheckSums());
    return std::move(step_);
  }

 private:
  void DescribeModules() {
    const semu::ModuleGradients gradients = semu::RequiredGradients(job_);
    for (size_t m = 0; m < job_.modules.size(); ++m) {
      ModuleInfo& info = modules_.emplace_back();
      info.mode.backward =
          !batch_.forward_only && gradients.Backward(static_cast<int>(m));
      info.query.weight_grad = info.mode.backward && gradients.weight[m];
      // Within a trained module all layers but the first pass gradients on; a
      // first layer that has no input gradient is an embedding and costs none.
      info.query.input_grad = info.mode.backward;
      info.mode.split_backward = options_.split_backward &&
                                 job_.executor.split_backward &&
                                 info.query.weight_grad;
      for (const semu::PipelineSegment& segment : layout_.modules[m].segments) {
        std::vector<ChunkInfo>& chunks = info.segments.emplace_back();
        for (const semu::Chunk& chunk : segment.chunks) {
          std::vector<LayerRun> runs = RunsOf(job_.modules[m], chunk);
          const auto it = std::find(info.runs.begin(), info.runs.end(), runs);
          chunks.push_back(
              {chunk.rank, static_cast<int>(it - info.runs.begin())});
          if (it == info.runs.end()) {
            info.keep.push_back(UniformChoice(runs, MemoryStrategy::kKeep));
            info.keep_pieces.push_back(PiecesOf(runs, info.keep.back()));
            info.runs.push_back(std::move(runs));
          }
        }
      }
    }
  }

  absl::Status CheckStageCount() const {
    int64_t stages = 0;
    for (const SubMicrobatch& sub : step_.sub_microbatches) {
      for (const auto& chunks : modules_[sub.module].segments) {
        stages += static_cast<int64_t>(chunks.size());
      }
    }
    if (stages <= kMaxStages) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("the batch makes ", stages,
                     " stages in this layout: must be at most ", kMaxStages));
  }

  // The distinct shapes, and of each module the largest.
  void FindShapes() {
    using Key =
        std::tuple<int, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;
    absl::flat_hash_map<Key, int> found;
    largest_.resize(job_.modules.size(), -1);
    step_.shapes = ShapesOf(job_, batch_, step_.sub_microbatches);
    found.reserve(step_.shapes.size());
    shapes_.reserve(step_.shapes.size());
    by_sub_.reserve(step_.shapes.size());
    for (size_t i = 0; i < step_.shapes.size(); ++i) {
      const SubMicrobatch& sub = step_.sub_microbatches[i];
      const Shape& s = step_.shapes[i];
      const auto [it, inserted] = found.try_emplace(
          Key(sub.module, s.items, s.tokens, s.sum_squares, s.max_tokens,
              s.condition_tokens, s.condition_products),
          static_cast<int>(shapes_.size()));
      if (inserted) {
        ShapeCosts& costs = shapes_.emplace_back();
        costs.module = sub.module;
        costs.shape = s;
      }
      by_sub_.push_back(it->second);
      int& largest = largest_[sub.module];
      if (largest < 0 || s.tokens > shapes_[largest].shape.tokens) {
        largest = it->second;
      }
    }
  }

  static constexpr int kShapesPerJob = 16;

  // Calls visit(job, first, end) for runs of shapes, on the threads of the
  // pool.
  template <typename Visitor>
  void ForRunsOfShapes(const Visitor& visit) {
    const int shapes = static_cast<int>(shapes_.size());
    const int jobs = (shapes + kShapesPerJob - 1) / kShapesPerJob;
    RunOn(options_.pool, jobs, [&](int, int job) {
      visit(job, job * kShapesPerJob,
            std::min(shapes, (job + 1) * kShapesPerJob));
    });
  }

  template <typename Visitor>
  void ForEachShape(const Visitor& visit) {
    ForRunsOfShapes([&](int, int first, int end) {
      for (int i = first; i < end; ++i) visit(shapes_[i]);
    });
  }

  void CostShapes() {
    layer_costs_.resize((shapes_.size() + kShapesPerJob - 1) / kShapesPerJob);
    ForRunsOfShapes([this](int job, int first, int end) {
      CostLayers(first, end, &layer_costs_[job]);
      for (int i = first; i < end; ++i) FinishShape(shapes_[i]);
    });
  }

  // Layer costs of a run of shapes, asked for together. The shapes refer to
  // `layers`.
  void CostLayers(int first, int end, std::vector<LayerCost>* layers) {
    std::vector<semu::LayerQuery> queries;
    size_t layers_of_run = 0;
    for (int i = first; i < end; ++i) {
      layers_of_run += job_.modules[shapes_[i].module].layers.size();
    }
    queries.reserve(layers_of_run);
    for (int i = first; i < end; ++i) {
      const ShapeCosts& costs = shapes_[i];
      semu::LayerQuery query = modules_[costs.module].query;
      query.shape = costs.shape;
      for (const semu::LayerGroup& group : job_.modules[costs.module].layers) {
        query.layer = group.layer;
        queries.push_back(query);
      }
    }
    *layers = costs_.CostAll(platform_, queries);
    size_t next = 0;
    for (int i = first; i < end; ++i) {
      const size_t groups = job_.modules[shapes_[i].module].layers.size();
      shapes_[i].layers = absl::MakeConstSpan(*layers).subspan(next, groups);
      next += groups;
    }
  }

  // What follows from the costs of a shape's layers.
  void FinishShape(ShapeCosts& costs) const {
    const ModuleInfo& info = modules_[costs.module];
    // A condition travels along with the activations.
    costs.output_bytes =
        costs.layers.back().output_bytes +
        semu::DataTypeBytes(job_.data_type) *
            CeilDiv(costs.shape.condition_tokens * ConditionWidth(costs.module),
                    gpus_);
    costs.richest_bytes.reserve(info.runs.size());
    for (size_t r = 0; r < info.runs.size(); ++r) {
      const Choice keep =
          StageChoice(info.keep_pieces[r], costs.layers, info.mode);
      costs.richest_bytes.push_back(
          std::max({keep.activation_bytes, keep.backward_bytes,
                    keep.weight_grad_bytes, keep.fused_backward_bytes}));
    }
  }

  void SetAsideForLongItems() {
    if (options_.layer_reserve_bytes.empty()) return;
    // The reserve is for the others.
    const bool any_long = std::any_of(
        shapes_.begin(), shapes_.end(), [this](const ShapeCosts& costs) {
          return costs.shape.tokens >
                     std::min(2 * layout_.modules[costs.module]
                                      .sub_microbatch_tokens,
                              job_.max_microbatch_tokens[costs.module]) ||
                 costs.shape.condition_tokens > 0;
        });
    if (!any_long) return;
    LayerReserve needed(job_);
    for (const ShapeCosts& costs : shapes_) {
      const ModuleInfo& info = modules_[costs.module];
      semu::LayerQuery query = info.query;
      query.shape = costs.shape;
      for (const auto& chunks : info.segments) {
        for (const ChunkInfo& chunk : chunks) {
          for (const LayerRun& run : info.runs[chunk.runs]) {
            query.layer = job_.modules[costs.module].layers[run.group].layer;
            needed.Add(chunk.rank, query, costs.layers[run.group]);
          }
        }
      }
    }
    step_.extra_reserve_bytes.assign(limits_.size(), 0);
    for (size_t r = 0; r < limits_.size(); ++r) {
      int64_t& extra = step_.extra_reserve_bytes[r];
      extra = std::max<int64_t>(0, needed.bytes(static_cast<int>(r)) -
                                       options_.layer_reserve_bytes[r]);
      limits_[r] = std::max<int64_t>(0, limits_[r] - extra);
    }
  }

  // A rank that can hold all its stages at once, at their richest, needs no
  // choices.
  void DecideWhoNeedsChoices() {
    std::vector<double> bytes(limits_.size(), 0);
    for (ModuleInfo& info : modules_) {
      info.needs_choices.assign(info.runs.size(), false);
    }
    for (size_t i = 0; i < step_.sub_microbatches.size(); ++i) {
      const ShapeCosts& costs = shapes_[by_sub_[i]];
      for (const auto& chunks : modules_[costs.module].segments) {
        for (const ChunkInfo& chunk : chunks) {
          bytes[chunk.rank] +=
              static_cast<double>(costs.richest_bytes[chunk.runs]);
        }
      }
    }
    for (ModuleInfo& info : modules_) {
      for (const auto& chunks : info.segments) {
        for (const ChunkInfo& chunk : chunks) {
          if (bytes[chunk.rank] > static_cast<double>(limits_[chunk.rank])) {
            info.needs_choices[chunk.runs] = true;
          }
        }
      }
    }
  }

  void FindChoices() {
    semu::ExecutorCapabilities executor = job_.executor;
    executor.offload &= options_.offload;
    for (size_t m = 0; m < modules_.size(); ++m) {
      ModuleInfo& info = modules_[m];
      for (size_t r = 0; r < info.runs.size(); ++r) {
        std::vector<MemoryChoice> choices;
        if (options_.strategy.has_value()) {
          choices = {UniformChoice(info.runs[r], *options_.strategy)};
        } else if (info.needs_choices[r] && info.mode.backward &&
                   !info.runs[r].empty() && largest_[m] >= 0) {
          const absl::Span<const LayerCost> layers =
              shapes_[largest_[m]].layers;
          choices = options_.uniform_choices
                        ? UniformChoices(info.runs[r], job_.executor)
                        : CandidateChoices(info.runs[r], layers, executor,
                                           options_.max_choices);
        } else {
          choices = {info.keep[r]};
        }
        std::vector<LayerPieces>& pieces = info.candidate_pieces.emplace_back();
        for (MemoryChoice& choice : choices) {
          pieces.push_back(PiecesOf(info.runs[r], choice));
          if (choice.offload_layers == 0) continue;
          for (const ShapeCosts& costs : shapes_) {
            if (costs.module != static_cast<int>(m)) continue;
            choice.offload_bytes =
                std::max(choice.offload_bytes,
                         OffloadBytes(pieces.back(), costs.layers));
          }
        }
        std::vector<std::string> names;
        names.reserve(choices.size());
        for (const MemoryChoice& choice : choices) names.push_back(choice.name);
        info.candidate_names.push_back(
            std::make_shared<const std::vector<std::string>>(std::move(names)));
        info.candidates.push_back(std::move(choices));
      }
      std::vector<std::vector<std::vector<MemoryChoice>>>& out =
          step_.choices.emplace_back();
      for (const auto& chunks : info.segments) {
        std::vector<std::vector<MemoryChoice>>& segment = out.emplace_back();
        for (const ChunkInfo& chunk : chunks) {
          segment.push_back(info.candidates[chunk.runs]);
        }
      }
    }
    ForEachShape([this](ShapeCosts& costs) {
      const ModuleInfo& info = modules_[costs.module];
      costs.sums.reserve(info.runs.size());
      costs.choices.reserve(info.runs.size());
      for (size_t r = 0; r < info.runs.size(); ++r) {
        std::vector<Choice> out;
        out.reserve(info.candidates[r].size());
        for (size_t c = 0; c < info.candidates[r].size(); ++c) {
          SetStageChoice(info.candidate_pieces[r][c], costs.layers, info.mode,
                         &out.emplace_back());
        }
        costs.sums.push_back(SumsOf(info.runs[r], costs.layers, out));
        costs.choices.emplace_back(std::move(out), info.candidate_names[r]);
      }
    });
  }

  static StageSums SumsOf(absl::Span<const LayerRun> runs,
                          absl::Span<const LayerCost> layers,
                          absl::Span<const Choice> choices) {
    StageSums sums;
    for (const Choice& choice : choices) {
      sums.longest_ns = std::max(
          sums.longest_ns, static_cast<double>(choice.forward_ns) +
                               static_cast<double>(choice.input_grad_ns) +
                               static_cast<double>(choice.weight_grad_ns));
      sums.most_bytes = std::max(
          sums.most_bytes, static_cast<double>(choice.activation_bytes) +
                               static_cast<double>(choice.backward_bytes) +
                               static_cast<double>(choice.weight_grad_bytes));
    }
    for (const LayerRun& run : runs) {
      const LayerCost& layer = layers[run.group];
      const semu::StrategyCost& keep = layer[MemoryStrategy::kKeep];
      const double ns =
          run.count * static_cast<double>(keep.forward_ns + keep.input_grad_ns +
                                          keep.weight_grad_ns);
      sums.layer_ns += ns;
      if (layer.measured) sums.measured_ns += ns;
    }
    return sums;
  }

  void WriteSweeps() {
    Problem& problem = step_.problem;
    problem.ranks = job_.parallelism.pipeline_parallel;
    problem.memory_limit_bytes.assign(limits_.begin(), limits_.end());
    for (const ModuleInfo& info : modules_) {
      problem.split_backward |= info.mode.split_backward;
    }
    // [microbatch], and the totals at the end.
    std::vector<MicrobatchStart> starts;
    const int microbatches = static_cast<int>(batch_.microbatches.size());
    starts.reserve(microbatches + 1);
    MicrobatchStart next;
    for (int b = 0; b < microbatches; ++b) {
      starts.push_back(next);
      while (next.sub < static_cast<int>(step_.sub_microbatches.size()) &&
             step_.sub_microbatches[next.sub].microbatch == b) {
        const int module = step_.sub_microbatches[next.sub++].module;
        next.sweep += static_cast<int>(modules_[module].segments.size());
      }
    }
    starts.push_back(next);
    problem.sweeps.resize(next.sweep);
    step_.sweeps.resize(next.sweep);
    step_.output_bytes.resize(next.sweep);
    step_.after_bytes.resize(next.sweep);
    last_sweep_.resize(next.sub, -1);

    constexpr int kMicrobatchesPerJob = 4;
    const std::vector<int> order = semu::TopologicalOrder(job_);
    std::vector<WrittenMicrobatch> written(microbatches);
    RunOn(options_.pool,
          (microbatches + kMicrobatchesPerJob - 1) / kMicrobatchesPerJob,
          [&](int, int job) {
            const int end =
                std::min(microbatches, (job + 1) * kMicrobatchesPerJob);
            for (int b = job * kMicrobatchesPerJob; b < end; ++b) {
              written[b] = WriteMicrobatch(order, b, starts[b], starts[b + 1]);
            }
          });
    for (int b = 0; b < microbatches; ++b) {
      sums_ += written[b].sums;
      for (const int m : written[b].empty_modules) {
        step_.empty.emplace_back(b, m);
      }
    }
  }

  // Writes the sweeps of microbatch `b`, producers first; it begins at `start`
  // and ends where the next one starts. `order`: of the modules. Other
  // microbatches may be written at the same time.
  WrittenMicrobatch WriteMicrobatch(const std::vector<int>& order, int b,
                                    const MicrobatchStart& start,
                                    const MicrobatchStart& end) {
    WrittenMicrobatch written;
    const semu::Microbatch& microbatch = batch_.microbatches[b];
    const size_t num_modules = job_.modules.size();
    // [module]: its first sub-microbatch, and `end` at the end: within a
    // microbatch they stand by module.
    std::vector<int> first_sub(num_modules + 1, end.sub);
    // [module][item]: the sub-microbatch that holds it.
    std::vector<std::vector<int>> holder(num_modules);
    int sub = start.sub;
    for (size_t m = 0; m < num_modules; ++m) {
      first_sub[m] = sub;
      holder[m].resize(microbatch.item_tokens[m].size());
      for (; sub < end.sub &&
             step_.sub_microbatches[sub].module == static_cast<int>(m);
           ++sub) {
        for (const int item : step_.sub_microbatches[sub].items) {
          holder[m][item] = sub;
        }
      }
      if (sub == first_sub[m]) {
        written.empty_modules.push_back(static_cast<int>(m));
      }
    }
    const std::vector<EdgeInput> inputs = EdgeInputs(microbatch, holder);
    int sweep = start.sweep;
    for (const int m : order) {
      for (sub = first_sub[m]; sub < first_sub[m + 1]; ++sub) {
        WriteSubMicrobatch(sub, sub - first_sub[m], sweep, inputs,
                           &written.sums);
        sweep += static_cast<int>(modules_[m].segments.size());
      }
    }
    SetEdgeTransferTimes(start.sweep, end.sweep, &written.sums);
    return written;
  }

  // What crosses the module graph's edges into a microbatch's sub-microbatches,
  // ascending, one entry a pair. `holder`: [module][item], the sub-microbatch
  // that holds it.
  std::vector<EdgeInput> EdgeInputs(
      const semu::Microbatch& microbatch,
      const std::vector<std::vector<int>>& holder) const {
    std::vector<EdgeInput> inputs;
    // Consumer, producer, producing item.
    std::vector<std::tuple<int, int, int>> crossings;
    for (size_t e = 0; e < job_.edges.size(); ++e) {
      const semu::ModuleEdge& edge = job_.edges[e];
      crossings.clear();
      crossings.reserve(microbatch.uses[e].size());
      for (const semu::ItemUse& use : microbatch.uses[e]) {
        crossings.emplace_back(holder[edge.consumer][use.consumer_item],
                               holder[edge.producer][use.producer_item],
                               use.producer_item);
      }
      // An item that several of a sub-microbatch's items use crosses once.
      std::sort(crossings.begin(), crossings.end());
      crossings.erase(std::unique(crossings.begin(), crossings.end()),
                      crossings.end());
      const std::vector<int64_t>& item_tokens =
          microbatch.item_tokens[edge.producer];
      const int64_t width = semu::OutputWidth(job_.modules[edge.producer]);
      int64_t tokens = 0;  // of a consumer and a producer
      for (size_t i = 0; i < crossings.size(); ++i) {
        const auto [consumer, producer, item] = crossings[i];
        tokens += CrossingTokens(edge, item_tokens[item]);
        if (i + 1 < crossings.size() &&
            std::get<0>(crossings[i + 1]) == consumer &&
            std::get<1>(crossings[i + 1]) == producer) {
          continue;
        }
        inputs.push_back({consumer, producer,
                          CeilDiv(tokens * width, gpus_) *
                              semu::DataTypeBytes(job_.data_type)});
        tokens = 0;
      }
    }
    // One entry of each two: at most one edge joins two modules.
    std::sort(inputs.begin(), inputs.end(), EdgeInput::Before);
    return inputs;
  }

  // Writes the sweeps of sub-microbatch `index`, the first one at
  // `first_sweep`, and adds its stages to `sums`. `number`: among those of its
  // microbatch and module; `inputs`: EdgeInputs of the microbatch.
  void WriteSubMicrobatch(int index, int number, int first_sweep,
                          const std::vector<EdgeInput>& inputs,
                          StageSums* sums) {
    const SubMicrobatch& sub = step_.sub_microbatches[index];
    const ModuleInfo& info = modules_[sub.module];
    const ShapeCosts& costs = shapes_[by_sub_[index]];
    for (size_t s = 0; s < info.segments.size(); ++s) {
      const std::vector<ChunkInfo>& chunks = info.segments[s];
      const bool last_segment = s + 1 == info.segments.size();
      const int number_of_sweep = first_sweep + static_cast<int>(s);
      Sweep& sweep = step_.problem.sweeps[number_of_sweep];
      sweep.id =
          absl::StrCat("mb", sub.microbatch, "/", job_.modules[sub.module].name,
                       "/", number, "/s", s);
      sweep.microbatch = sub.microbatch;
      sweep.backward = info.mode.backward;
      auto& after_bytes = step_.after_bytes[number_of_sweep];
      if (s == 0) {
        const auto [begin, end] =
            std::equal_range(inputs.begin(), inputs.end(), EdgeInput{index},
                             [](const EdgeInput& a, const EdgeInput& b) {
                               return a.consumer < b.consumer;
                             });
        sweep.after.reserve(end - begin);
        after_bytes.reserve(end - begin);
        for (auto input = begin; input != end; ++input) {
          sweep.after.push_back(last_sweep_[input->producer]);
          after_bytes.push_back(input->bytes);
        }
      } else {
        sweep.after.assign(1, number_of_sweep - 1);
        after_bytes.assign(1, costs.output_bytes);
      }
      step_.output_bytes[number_of_sweep] = costs.output_bytes;
      sweep.stages.resize(chunks.size());
      for (size_t c = 0; c < chunks.size(); ++c) {
        Stage& stage = sweep.stages[c];
        stage.rank = chunks[c].rank;
        stage.choices = costs.choices[chunks[c].runs];
        if (c + 1 < chunks.size()) {
          stage.transfer_ns =
              CrossNs(stage.rank, chunks[c + 1].rank, costs.output_bytes);
        } else if (!last_segment) {
          stage.transfer_ns =
              CrossNs(stage.rank, info.segments[s + 1].front().rank,
                      costs.output_bytes);
        }
        *sums += costs.sums[chunks[c].runs];
        sums->longest_ns += 2 * static_cast<double>(stage.transfer_ns);
      }
      step_.sweeps[number_of_sweep] = {index, static_cast<int>(s)};
      if (last_segment) last_sweep_[index] = number_of_sweep;
    }
  }

  // A last stage's output goes to every consumer: as slow as the slowest. For
  // the sweeps of a microbatch, `first` to `end`; counts them into `sums`.
  void SetEdgeTransferTimes(int first, int end, StageSums* sums) {
    std::vector<Sweep>& sweeps = step_.problem.sweeps;
    for (int i = first; i < end; ++i) {
      if (step_.sweeps[i].segment > 0) continue;
      for (size_t k = 0; k < sweeps[i].after.size(); ++k) {
        Stage& from = sweeps[sweeps[i].after[k]].stages.back();
        const int64_t transfer_ns = CrossNs(
            from.rank, sweeps[i].stages.front().rank, step_.after_bytes[i][k]);
        if (transfer_ns <= from.transfer_ns) continue;
        sums->longest_ns +=
            2 * static_cast<double>(transfer_ns - from.transfer_ns);
        from.transfer_ns = transfer_ns;
      }
    }
  }

  int64_t CrossNs(int from, int to, int64_t bytes) const {
    if (from == to) return 0;
    return semu::TransferNs(
        semu::P2pLink(job_.parallelism, job_.links, from, to), bytes);
  }

  absl::Status CheckSums() {
    step_.measured_share =
        sums_.layer_ns > 0 ? sums_.measured_ns / sums_.layer_ns : 0;
    if (sums_.longest_ns > kMaxSum || sums_.most_bytes > kMaxSum) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the batch's stages take ", sums_.longest_ns, " ns and ",
          sums_.most_bytes, " bytes in all: each must be at most ", kMaxSum,
          "; device, links or items are out of proportion"));
    }
    return absl::OkStatus();
  }

  // Width of a token of a module's condition: of its widest producer.
  int64_t ConditionWidth(int module) const {
    int64_t width = 0;
    for (const semu::ModuleEdge& edge : job_.edges) {
      if (edge.consumer == module) {
        width = std::max(width, semu::OutputWidth(job_.modules[edge.producer]));
      }
    }
    return width;
  }

  static int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

  const Job& job_;
  const Layout& layout_;
  std::vector<int64_t> limits_;  // [rank]
  const Batch& batch_;
  const semu::CostModel& costs_;
  const StepProblemOptions& options_;
  const semu::Platform platform_;
  const int64_t gpus_;  // of a rank

  StepProblem step_;
  std::vector<ModuleInfo> modules_;
  std::vector<ShapeCosts> shapes_;
  std::vector<std::vector<LayerCost>> layer_costs_;  // of runs of shapes
  std::vector<int> by_sub_;      // [sub-microbatch]: index in shapes_
  std::vector<int> largest_;     // [module]: index in shapes_; -1: none
  std::vector<int> last_sweep_;  // [sub-microbatch]
  StageSums sums_;               // over all stages, transfers included
};

}  // namespace

absl::StatusOr<StepProblem> BuildStepProblem(
    const Job& job, const Layout& layout,
    absl::Span<const int64_t> memory_limit_bytes, const Batch& batch,
    const semu::CostModel& costs, const StepProblemOptions& options) {
  return Builder(job, layout, memory_limit_bytes, batch, costs, options).Run();
}

}  // namespace pipeweaver::search
