// Split, cost, choose candidates, then write one sweep after the other.

#include "search/partition/step_problem_builder.h"

#include <algorithm>
#include <cstddef>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
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
  // [runs]: choices, the layers under each, and whether any chunk of these runs
  // needs more than "keep".
  std::vector<std::vector<MemoryChoice>> candidates;
  std::vector<std::vector<LayerPieces>> candidate_pieces;
  std::vector<bool> needs_choices;
};

// What one stage adds to the sums over all.
struct StageSums {
  double longest_ns = 0;
  double most_bytes = 0;
  double layer_ns = 0;
  double measured_ns = 0;
};

// Costs of a module at one shape.
struct ShapeCosts {
  int module = 0;
  Shape shape;
  std::vector<LayerCost> layers;       // [group]
  int64_t output_bytes = 0;            // between layers
  std::vector<int64_t> richest_bytes;  // [runs]: most held where all is kept
  std::vector<ChoiceList> choices;     // [runs]
  std::vector<StageSums> sums;         // [runs]
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

  // Calls visit(first, end) for runs of shapes, on the threads of the pool.
  template <typename Visitor>
  void ForRunsOfShapes(const Visitor& visit) {
    constexpr int kShapesPerJob = 16;
    const int shapes = static_cast<int>(shapes_.size());
    const int jobs = (shapes + kShapesPerJob - 1) / kShapesPerJob;
    RunOn(options_.pool, jobs, [&](int, int job) {
      visit(job * kShapesPerJob, std::min(shapes, (job + 1) * kShapesPerJob));
    });
  }

  template <typename Visitor>
  void ForEachShape(const Visitor& visit) {
    ForRunsOfShapes([&](int first, int end) {
      for (int i = first; i < end; ++i) visit(shapes_[i]);
    });
  }

  void CostShapes() {
    ForRunsOfShapes([this](int first, int end) {
      CostLayers(first, end);
      for (int i = first; i < end; ++i) FinishShape(shapes_[i]);
    });
  }

  // Layer costs of a run of shapes, asked for together.
  void CostLayers(int first, int end) {
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
    const std::vector<LayerCost> layers = costs_.CostAll(platform_, queries);
    auto next = layers.begin();
    for (int i = first; i < end; ++i) {
      ShapeCosts& costs = shapes_[i];
      const auto begin = next;
      next +=
          static_cast<std::ptrdiff_t>(job_.modules[costs.module].layers.size());
      costs.layers.assign(begin, next);
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
      const Choice keep = StageChoice(info.keep[r].name, info.keep_pieces[r],
                                      costs.layers, info.mode);
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
          const std::vector<LayerCost>& layers = shapes_[largest_[m]].layers;
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
          out.push_back(StageChoice(info.candidates[r][c].name,
                                    info.candidate_pieces[r][c], costs.layers,
                                    info.mode));
        }
        costs.sums.push_back(SumsOf(info.runs[r], costs.layers, out));
        costs.choices.emplace_back(std::move(out));
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
    const size_t num_modules = job_.modules.size();
    size_t num_sweeps = 0;
    for (const SubMicrobatch& sub : step_.sub_microbatches) {
      num_sweeps += modules_[sub.module].segments.size();
    }
    problem.sweeps.reserve(num_sweeps);
    step_.sweeps.reserve(num_sweeps);
    step_.output_bytes.reserve(num_sweeps);
    step_.after_bytes.reserve(num_sweeps);

    // Sub-microbatches stand by microbatch: the problem lists each microbatch's
    // sweeps producers first.
    const std::vector<int> order = semu::TopologicalOrder(job_);
    size_t begin = 0;
    for (size_t b = 0; b < batch_.microbatches.size(); ++b) {
      size_t end = begin;
      std::vector<std::vector<int>> by_module(num_modules);
      while (end < step_.sub_microbatches.size() &&
             step_.sub_microbatches[end].microbatch == static_cast<int>(b)) {
        by_module[step_.sub_microbatches[end].module].push_back(
            static_cast<int>(end));
        ++end;
      }
      for (size_t m = 0; m < num_modules; ++m) {
        if (by_module[m].empty()) {
          step_.empty.emplace_back(static_cast<int>(b), static_cast<int>(m));
        }
      }
      // [module][item]: the sub-microbatch that holds it.
      std::vector<std::vector<int>> holder(num_modules);
      for (size_t m = 0; m < num_modules; ++m) {
        holder[m].resize(batch_.microbatches[b].item_tokens[m].size());
        for (int sub : by_module[m]) {
          for (int item : step_.sub_microbatches[sub].items) {
            holder[m][item] = sub;
          }
        }
      }
      last_sweep_.resize(end, -1);
      const std::vector<std::map<int, int64_t>> bytes =
          EdgeBytes(batch_.microbatches[b], static_cast<int>(begin),
                    static_cast<int>(end), holder);
      for (int m : order) {
        for (size_t k = 0; k < by_module[m].size(); ++k) {
          WriteSubMicrobatch(by_module[m][k], static_cast<int>(k),
                             bytes[by_module[m][k] - begin]);
        }
      }
      begin = end;
    }
    SetEdgeTransferTimes();
  }

  // Of each of a microbatch's sub-microbatches, `begin` to `end`: the bytes per
  // GPU that cross the module graph's edges into it, by producing
  // sub-microbatch. `holder`: [module][item], the sub-microbatch that holds it.
  std::vector<std::map<int, int64_t>> EdgeBytes(
      const semu::Microbatch& microbatch, int begin, int end,
      const std::vector<std::vector<int>>& holder) const {
    std::vector<std::map<int, int64_t>> bytes(end - begin);
    std::vector<std::pair<int, int>> crossings;  // consumer, producing item
    for (size_t e = 0; e < job_.edges.size(); ++e) {
      const semu::ModuleEdge& edge = job_.edges[e];
      crossings.clear();
      for (const semu::ItemUse& use : microbatch.uses[e]) {
        crossings.emplace_back(holder[edge.consumer][use.consumer_item],
                               use.producer_item);
      }
      // An item that several of a sub-microbatch's items use crosses once.
      std::sort(crossings.begin(), crossings.end());
      crossings.erase(std::unique(crossings.begin(), crossings.end()),
                      crossings.end());
      const std::vector<int64_t>& item_tokens =
          microbatch.item_tokens[edge.producer];
      const int64_t width = semu::OutputWidth(job_.modules[edge.producer]);
      std::map<int, int64_t> tokens;  // of one consumer, by producer
      for (size_t i = 0; i < crossings.size(); ++i) {
        const auto [consumer, item] = crossings[i];
        tokens[holder[edge.producer][item]] +=
            CrossingTokens(edge, item_tokens[item]);
        if (i + 1 < crossings.size() && crossings[i + 1].first == consumer) {
          continue;
        }
        for (const auto& [producer, count] : tokens) {
          bytes[consumer - begin][producer] +=
              CeilDiv(count * width, gpus_) *
              semu::DataTypeBytes(job_.data_type);
        }
        tokens.clear();
      }
    }
    return bytes;
  }

  // `edge_bytes`: EdgeBytes of the sub-microbatch.
  void WriteSubMicrobatch(int index, int number,
                          const std::map<int, int64_t>& edge_bytes) {
    const SubMicrobatch& sub = step_.sub_microbatches[index];
    const ModuleInfo& info = modules_[sub.module];
    const ShapeCosts& costs = shapes_[by_sub_[index]];
    for (size_t s = 0; s < info.segments.size(); ++s) {
      const std::vector<ChunkInfo>& chunks = info.segments[s];
      const bool last_segment = s + 1 == info.segments.size();
      Sweep& sweep = step_.problem.sweeps.emplace_back();
      sweep.id =
          absl::StrCat("mb", sub.microbatch, "/", job_.modules[sub.module].name,
                       "/", number, "/s", s);
      sweep.microbatch = sub.microbatch;
      sweep.backward = info.mode.backward;
      std::vector<int64_t>& after_bytes = step_.after_bytes.emplace_back();
      if (s == 0) {
        for (const auto& [producer, bytes] : edge_bytes) {
          sweep.after.push_back(last_sweep_[producer]);
          after_bytes.push_back(bytes);
        }
      } else {
        sweep.after.push_back(static_cast<int>(step_.problem.sweeps.size()) -
                              2);
        after_bytes.push_back(costs.output_bytes);
      }
      std::vector<int64_t>& output = step_.output_bytes.emplace_back();
      sweep.stages.reserve(chunks.size());
      output.reserve(chunks.size());
      for (size_t c = 0; c < chunks.size(); ++c) {
        Stage& stage = sweep.stages.emplace_back();
        stage.rank = chunks[c].rank;
        stage.choices = costs.choices[chunks[c].runs];
        const bool last_chunk = c + 1 == chunks.size();
        output.push_back(last_chunk ? 0 : costs.output_bytes);
        if (!last_chunk) {
          stage.transfer_ns =
              CrossNs(stage.rank, chunks[c + 1].rank, costs.output_bytes);
        } else if (!last_segment) {
          stage.transfer_ns =
              CrossNs(stage.rank, info.segments[s + 1].front().rank,
                      costs.output_bytes);
        }
        Count(costs.sums[chunks[c].runs], stage.transfer_ns);
      }
      step_.sweeps.push_back({index, static_cast<int>(s)});
      if (last_segment) {
        last_sweep_[index] = static_cast<int>(step_.problem.sweeps.size()) - 1;
      }
    }
  }

  // A last stage's output goes to every consumer: as slow as the slowest.
  void SetEdgeTransferTimes() {
    std::vector<Sweep>& sweeps = step_.problem.sweeps;
    for (size_t i = 0; i < sweeps.size(); ++i) {
      if (step_.sweeps[i].segment > 0) continue;
      for (size_t k = 0; k < sweeps[i].after.size(); ++k) {
        Stage& from = sweeps[sweeps[i].after[k]].stages.back();
        from.transfer_ns = std::max(
            from.transfer_ns, CrossNs(from.rank, sweeps[i].stages.front().rank,
                                      step_.after_bytes[i][k]));
      }
    }
  }

  int64_t CrossNs(int from, int to, int64_t bytes) const {
    if (from == to) return 0;
    return semu::TransferNs(
        semu::P2pLink(job_.parallelism, job_.links, from, to), bytes);
  }

  // Adds a stage to the measured share and to the sums that must not overflow.
  void Count(const StageSums& stage, int64_t transfer_ns) {
    sums_.longest_ns += stage.longest_ns + 2 * static_cast<double>(transfer_ns);
    sums_.most_bytes += stage.most_bytes;
    sums_.layer_ns += stage.layer_ns;
    sums_.measured_ns += stage.measured_ns;
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
