// Checks field by field, in the order of the messages, and stops at the first
// rule that is broken.

#include "semu/model/job_proto.h"

#include <map>
#include <string>
#include <tuple>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "semu/base/status_macros.h"
#include "semu/model/layer_size.h"
#include "semu/model/module_graph.h"

namespace pipeweaver::semu {
namespace {

constexpr int64_t kMaxEdges = 256;
constexpr int64_t kMaxLayerGroups = 256;
constexpr int64_t kMaxLayers = 4096;
constexpr int64_t kMaxWidth = int64_t{1} << 24;
constexpr int64_t kMaxParameters = int64_t{1} << 50;
constexpr int64_t kMaxRanks = 4096;
constexpr int64_t kMaxReplicas = int64_t{1} << 20;
constexpr int64_t kMaxDeviceBytes = int64_t{1} << 50;
constexpr int64_t kMinRate = 1'000'000;
constexpr int64_t kMaxRate = 1'000'000'000'000'000'000;
constexpr int64_t kMaxLatencyNs = 1'000'000'000'000;
constexpr int64_t kMaxBuckets = 1024;

template <typename... Parts>
absl::Status Invalid(const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat(parts...));
}

absl::Status InRange(absl::string_view field, int64_t value, int64_t least,
                     int64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return Invalid(field, " is ", value, ": must be ", least, " to ", most);
}

// As InRange, where 0 stands for `value_if_zero`.
absl::StatusOr<int> OrDefault(absl::string_view field, int64_t value,
                              int value_if_zero, int64_t most) {
  if (value == 0) return value_if_zero;
  if (value < 0 || value > most) {
    return Invalid(field, " is ", value, ": must be 0 (meaning ", value_if_zero,
                   ") to ", most);
  }
  return static_cast<int>(value);
}

absl::StatusOr<LayerSpec> LayerFromProto(const std::string& path,
                                         const v1::LayerGroup& proto) {
  LayerSpec layer;
  const auto at = [&path](absl::string_view field) {
    return absl::StrCat(path, ".", field);
  };
  bool attention = false;
  bool ffn = false;
  bool vocabulary = false;
  bool input = false;
  switch (proto.kind()) {
    case v1::LAYER_KIND_TRANSFORMER:
      layer.kind = LayerKind::kTransformer;
      attention = ffn = true;
      break;
    case v1::LAYER_KIND_DIT:
      layer.kind = LayerKind::kDit;
      attention = ffn = true;
      break;
    case v1::LAYER_KIND_EMBEDDING:
      layer.kind = LayerKind::kEmbedding;
      vocabulary = true;
      break;
    case v1::LAYER_KIND_LM_HEAD:
      layer.kind = LayerKind::kLmHead;
      vocabulary = true;
      break;
    case v1::LAYER_KIND_PATCH_EMBED:
      layer.kind = LayerKind::kPatchEmbed;
      input = true;
      break;
    case v1::LAYER_KIND_PROJECTOR:
      layer.kind = LayerKind::kProjector;
      ffn = input = true;
      break;
    default:
      return Invalid(at("kind"), " is ", static_cast<int>(proto.kind()),
                     ": must be a LayerKind other than unspecified");
  }
  PW_RETURN_IF_ERROR(
      InRange(at("hidden_size"), proto.hidden_size(), 1, kMaxWidth));
  layer.hidden_size = proto.hidden_size();
  PW_RETURN_IF_ERROR(
      InRange(at("ffn_size"), proto.ffn_size(), ffn ? 1 : 0, kMaxWidth));
  if (ffn) layer.ffn_size = proto.ffn_size();
  PW_RETURN_IF_ERROR(
      InRange(at("heads"), proto.heads(), attention ? 1 : 0, kMaxWidth));
  PW_RETURN_IF_ERROR(InRange(at("kv_heads"), proto.kv_heads(), 0, kMaxWidth));
  if (attention) {
    layer.heads = proto.heads();
    layer.kv_heads = proto.kv_heads() == 0 ? proto.heads() : proto.kv_heads();
    if (layer.hidden_size % layer.heads != 0) {
      return Invalid(at("heads"), " is ", layer.heads, ": must divide ",
                     at("hidden_size"), " = ", layer.hidden_size);
    }
    if (layer.heads % layer.kv_heads != 0) {
      return Invalid(at("kv_heads"), " is ", layer.kv_heads,
                     ": must divide heads = ", layer.heads);
    }
    layer.gated_ffn = proto.gated_ffn();
    layer.causal = proto.causal();
  }
  PW_RETURN_IF_ERROR(InRange(at("vocab_size"), proto.vocab_size(),
                             vocabulary ? 1 : 0, kMaxWidth));
  if (vocabulary) layer.vocab_size = proto.vocab_size();
  PW_RETURN_IF_ERROR(
      InRange(at("input_size"), proto.input_size(), input ? 1 : 0, kMaxWidth));
  if (input) layer.input_size = proto.input_size();
  return layer;
}

absl::StatusOr<Modality> ModalityFromProto(const std::string& field,
                                           v1::Modality proto) {
  switch (proto) {
    case v1::MODALITY_UNSPECIFIED:
      return Modality::kInherited;
    case v1::MODALITY_TEXT:
      return Modality::kText;
    case v1::MODALITY_IMAGE:
      return Modality::kImage;
    case v1::MODALITY_VIDEO:
      return Modality::kVideo;
    case v1::MODALITY_AUDIO:
      return Modality::kAudio;
    default:
      return Invalid(field, " is ", static_cast<int>(proto),
                     ": must be a Modality");
  }
}

absl::StatusOr<Module> ModuleFromProto(const std::string& path,
                                       const v1::Module& proto) {
  Module module;
  PW_RETURN_IF_ERROR(ValidateName(absl::StrCat(path, ".name"), proto.name()));
  module.name = proto.name();
  PW_ASSIGN_OR_RETURN(
      module.modality,
      ModalityFromProto(absl::StrCat(path, ".modality"), proto.modality()));
  PW_RETURN_IF_ERROR(InRange(absl::StrCat("number of ", path, ".layers"),
                             proto.layers_size(), 1, kMaxLayerGroups));
  int64_t num_layers = 0;
  for (int g = 0; g < proto.layers_size(); ++g) {
    const std::string at = absl::StrCat(path, ".layers[", g, "]");
    PW_RETURN_IF_ERROR(InRange(absl::StrCat(at, ".count"),
                               proto.layers(g).count(), 1, kMaxLayers));
    num_layers += proto.layers(g).count();
    PW_ASSIGN_OR_RETURN(LayerSpec layer, LayerFromProto(at, proto.layers(g)));
    const bool opens_stream = layer.kind == LayerKind::kEmbedding ||
                              layer.kind == LayerKind::kPatchEmbed;
    if (g > 0 && !opens_stream &&
        layer.hidden_size != OutputWidth(module.layers.back().layer)) {
      return Invalid(at, ".hidden_size is ", layer.hidden_size,
                     ": must be the output width of the layers before it, ",
                     OutputWidth(module.layers.back().layer));
    }
    if (g > 0 && opens_stream) {
      return Invalid(at, ".kind is ", static_cast<int>(proto.layers(g).kind()),
                     ": an embedding must be the first layer of its module");
    }
    if (opens_stream && proto.layers(g).count() != 1) {
      return Invalid(at, ".count is ", proto.layers(g).count(),
                     ": a module has one embedding");
    }
    if (layer.kind == LayerKind::kProjector && proto.layers(g).count() > 1 &&
        OutputWidth(layer) != layer.hidden_size) {
      return Invalid(at, ".count is ", proto.layers(g).count(),
                     ": must be 1 where a projector's input_size differs from "
                     "its hidden_size");
    }
    module.layers.push_back({layer, proto.layers(g).count()});
  }
  PW_RETURN_IF_ERROR(InRange(absl::StrCat("sum of ", path, ".layers.count"),
                             num_layers, 1, kMaxLayers));
  module.frozen = proto.frozen();
  const v1::TokenGrid& grid = proto.token_grid();
  const std::string at = absl::StrCat(path, ".token_grid");
  PW_RETURN_IF_ERROR(InRange(absl::StrCat(at, ".pixels_per_token_height"),
                             grid.pixels_per_token_height(), 0, kMaxWidth));
  PW_RETURN_IF_ERROR(InRange(absl::StrCat(at, ".pixels_per_token_width"),
                             grid.pixels_per_token_width(), 0, kMaxWidth));
  if ((grid.pixels_per_token_height() == 0) !=
      (grid.pixels_per_token_width() == 0)) {
    return Invalid(
        at, " has pixels_per_token_height = ", grid.pixels_per_token_height(),
        " and pixels_per_token_width = ", grid.pixels_per_token_width(),
        ": both must be set, or none");
  }
  module.token_grid.pixels_per_token_height = grid.pixels_per_token_height();
  module.token_grid.pixels_per_token_width = grid.pixels_per_token_width();
  PW_ASSIGN_OR_RETURN(module.token_grid.frames_per_token,
                      OrDefault(absl::StrCat(at, ".frames_per_token"),
                                grid.frames_per_token(), 1, kMaxWidth));
  return module;
}

absl::Status ReadGraph(const v1::Job& proto, Job* job) {
  PW_RETURN_IF_ERROR(
      InRange("number of modules", proto.modules_size(), 1, kMaxModules));
  std::map<std::string, int> index;
  double parameters = 0;
  for (int m = 0; m < proto.modules_size(); ++m) {
    const std::string path = absl::StrCat("modules[", m, "]");
    PW_ASSIGN_OR_RETURN(Module module, ModuleFromProto(path, proto.modules(m)));
    const auto [it, inserted] = index.emplace(module.name, m);
    if (!inserted) {
      return Invalid(path, ".name is \"", module.name,
                     "\": must be unique, modules[", it->second, "] has it");
    }
    for (const LayerGroup& group : module.layers) {
      parameters += static_cast<double>(ParameterCount(group.layer)) *
                    static_cast<double>(group.count);
    }
    job->modules.push_back(std::move(module));
  }
  if (parameters > static_cast<double>(kMaxParameters)) {
    return Invalid("modules have ", parameters, " parameters: must be at most ",
                   kMaxParameters);
  }

  PW_RETURN_IF_ERROR(
      InRange("number of edges", proto.edges_size(), 0, kMaxEdges));
  std::map<std::pair<int, int>, int> seen;
  for (int e = 0; e < proto.edges_size(); ++e) {
    const std::string path = absl::StrCat("edges[", e, "]");
    ModuleEdge edge;
    for (const auto& [field, name, target] :
         {std::tuple("producer", &proto.edges(e).producer(), &edge.producer),
          std::tuple("consumer", &proto.edges(e).consumer(), &edge.consumer)}) {
      const auto it = index.find(*name);
      if (it == index.end()) {
        return Invalid(path, ".", field, " is \"", *name,
                       "\": must name a module of the job");
      }
      *target = it->second;
    }
    const auto [it, inserted] =
        seen.emplace(std::pair(edge.producer, edge.consumer), e);
    if (!inserted) {
      return Invalid(path, " repeats edges[", it->second, "], ",
                     proto.edges(e).producer(), " -> ",
                     proto.edges(e).consumer(),
                     ": at most one edge between two modules");
    }
    PW_ASSIGN_OR_RETURN(
        edge.tokens_merged,
        OrDefault(absl::StrCat(path, ".tokens_merged"),
                  proto.edges(e).tokens_merged(), 1, kMaxWidth));
    job->edges.push_back(edge);
  }

  const std::vector<int> order = TopologicalOrder(*job);
  if (order.size() < job->modules.size()) {
    // Every module left has a producer that is left too: walking back from any
    // of them runs into the circle.
    std::vector<bool> placed(job->modules.size(), false);
    for (int m : order) placed[m] = true;
    int m = 0;
    while (placed[m]) ++m;
    std::vector<bool> visited(job->modules.size(), false);
    while (!visited[m]) {
      visited[m] = true;
      for (const ModuleEdge& edge : job->edges) {
        if (edge.consumer == m && !placed[edge.producer]) {
          m = edge.producer;
          break;
        }
      }
    }
    return Invalid("edges form a circle through module \"",
                   job->modules[m].name,
                   "\": the module graph must have no circles");
  }
  for (size_t m = 0; m < job->modules.size(); ++m) {
    if (job->modules[m].modality != Modality::kInherited) continue;
    int producers = 0;
    for (const ModuleEdge& edge : job->edges) {
      producers += edge.consumer == static_cast<int>(m) ? 1 : 0;
    }
    if (producers != 1) {
      return Invalid("modules[", m, "] \"", job->modules[m].name,
                     "\" has no modality and ", producers,
                     " producers: nothing feeds it; a module needs a modality "
                     "or exactly one producer");
    }
  }
  return absl::OkStatus();
}

absl::Status ReadParallelism(const v1::Parallelism& proto, Parallelism* out) {
  PW_ASSIGN_OR_RETURN(out->tensor_parallel,
                      OrDefault("parallelism.tensor_parallel",
                                proto.tensor_parallel(), 1, kMaxGpusOfRank));
  PW_RETURN_IF_ERROR(InRange("parallelism.pipeline_parallel",
                             proto.pipeline_parallel(), 1, kMaxRanks));
  out->pipeline_parallel = proto.pipeline_parallel();
  PW_ASSIGN_OR_RETURN(out->context_parallel,
                      OrDefault("parallelism.context_parallel",
                                proto.context_parallel(), 1, kMaxGpusOfRank));
  PW_ASSIGN_OR_RETURN(out->data_parallel,
                      OrDefault("parallelism.data_parallel",
                                proto.data_parallel(), 1, kMaxReplicas));
  return absl::OkStatus();
}

absl::Status ReadLink(const std::string& field, const v1::Link& proto,
                      Link* link) {
  PW_RETURN_IF_ERROR(InRange(absl::StrCat(field, ".latency_ns"),
                             proto.latency_ns(), 0, kMaxLatencyNs));
  PW_RETURN_IF_ERROR(InRange(absl::StrCat(field, ".bandwidth_bytes_per_second"),
                             proto.bandwidth_bytes_per_second(), kMinRate,
                             kMaxRate));
  link->latency_ns = proto.latency_ns();
  link->bandwidth_bytes_per_second = proto.bandwidth_bytes_per_second();
  return absl::OkStatus();
}

absl::Status ReadDevice(const v1::Job& proto, Job* job) {
  const v1::Device& device = proto.device();
  if (device.name().size() > 255) {
    return Invalid("device.name has ", device.name().size(),
                   " bytes: must have at most 255");
  }
  job->device.name = device.name();
  PW_RETURN_IF_ERROR(InRange("device.peak_flops_per_second",
                             device.peak_flops_per_second(), kMinRate,
                             kMaxRate));
  job->device.peak_flops_per_second = device.peak_flops_per_second();
  PW_RETURN_IF_ERROR(InRange("device.memory_bandwidth_bytes_per_second",
                             device.memory_bandwidth_bytes_per_second(),
                             kMinRate, kMaxRate));
  job->device.memory_bandwidth_bytes_per_second =
      device.memory_bandwidth_bytes_per_second();
  PW_RETURN_IF_ERROR(InRange("device.memory_bytes", device.memory_bytes(), 1,
                             kMaxDeviceBytes));
  job->device.memory_bytes = device.memory_bytes();

  const v1::Links& links = proto.links();
  PW_RETURN_IF_ERROR(ReadLink("links.tensor_parallel", links.tensor_parallel(),
                              &job->links.tensor_parallel));
  PW_RETURN_IF_ERROR(ReadLink("links.p2p_intra_node", links.p2p_intra_node(),
                              &job->links.p2p_intra_node));
  PW_RETURN_IF_ERROR(ReadLink("links.p2p_inter_node", links.p2p_inter_node(),
                              &job->links.p2p_inter_node));
  PW_ASSIGN_OR_RETURN(
      job->links.gpus_per_node,
      OrDefault("links.gpus_per_node", links.gpus_per_node(), 8, kMaxRanks));
  if (links.has_host() || proto.executor().offload()) {
    PW_RETURN_IF_ERROR(ReadLink("links.host", links.host(), &job->links.host));
  }

  const int64_t budget = proto.memory_budget_bytes();
  if (budget < 0 || budget > device.memory_bytes()) {
    return Invalid("memory_budget_bytes is ", budget,
                   ": must be 0 (meaning 94 % of the device) to "
                   "device.memory_bytes = ",
                   device.memory_bytes());
  }
  job->memory_budget_bytes = budget == 0
                                 ? device.memory_bytes() / 100 * 94 +
                                       device.memory_bytes() % 100 * 94 / 100
                                 : budget;
  return absl::OkStatus();
}

absl::Status ReadExecutor(const v1::ExecutorCapabilities& proto,
                          ExecutorCapabilities* out) {
  out->split_backward = proto.split_backward();
  out->selective_recompute = proto.selective_recompute();
  out->full_recompute = proto.full_recompute();
  out->offload = proto.offload();
  out->v_placement = proto.v_placement();
  out->batched_p2p = proto.batched_p2p();
  out->moved_microbatches = proto.moved_microbatches();
  PW_ASSIGN_OR_RETURN(out->max_receives_ahead,
                      OrDefault("executor.max_receives_ahead",
                                proto.max_receives_ahead(), 2, 1024));
  PW_ASSIGN_OR_RETURN(
      out->max_segments,
      OrDefault("executor.max_segments", proto.max_segments(), 4, 64));
  PW_RETURN_IF_ERROR(InRange("number of executor.shape_buckets",
                             proto.shape_buckets_size(), 0, kMaxBuckets));
  for (int i = 0; i < proto.shape_buckets_size(); ++i) {
    const std::string field = absl::StrCat("executor.shape_buckets[", i, "]");
    PW_RETURN_IF_ERROR(
        InRange(field, proto.shape_buckets(i), 1, kMaxMicrobatchTokens));
    if (i > 0 && proto.shape_buckets(i) <= proto.shape_buckets(i - 1)) {
      return Invalid(field, " is ", proto.shape_buckets(i),
                     ": must be more than the bucket before it, ",
                     proto.shape_buckets(i - 1));
    }
    out->shape_buckets.push_back(proto.shape_buckets(i));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ValidateName(absl::string_view field, absl::string_view name) {
  bool valid = !name.empty() && name.size() <= 63;
  for (char c : name) {
    valid =
        valid && (absl::ascii_isalnum(c) || c == '_' || c == '-' || c == '.');
  }
  if (valid) return absl::OkStatus();
  return Invalid(field, " is \"", absl::CHexEscape(name.substr(0, 80)),
                 "\": must be 1 to 63 letters, digits, '_', '-' or '.'");
}

absl::StatusOr<Job> JobFromProto(const v1::Job& proto) {
  Job job;
  PW_RETURN_IF_ERROR(ValidateName("name", proto.name()));
  job.name = proto.name();
  PW_RETURN_IF_ERROR(ReadGraph(proto, &job));
  PW_RETURN_IF_ERROR(ReadParallelism(proto.parallelism(), &job.parallelism));
  switch (proto.data_type()) {
    case v1::DATA_TYPE_UNSPECIFIED:
    case v1::DATA_TYPE_BF16:
      job.data_type = DataType::kBf16;
      break;
    case v1::DATA_TYPE_FP16:
      job.data_type = DataType::kFp16;
      break;
    case v1::DATA_TYPE_FP32:
      job.data_type = DataType::kFp32;
      break;
    default:
      return Invalid("data_type is ", static_cast<int>(proto.data_type()),
                     ": must be a DataType");
  }
  switch (proto.optimizer_sharding()) {
    case v1::OPTIMIZER_SHARDING_UNSPECIFIED:
      job.optimizer_sharding = OptimizerSharding::kNone;
      break;
    case v1::OPTIMIZER_SHARDING_STATES:
      job.optimizer_sharding = OptimizerSharding::kStates;
      break;
    case v1::OPTIMIZER_SHARDING_STATES_AND_GRADIENTS:
      job.optimizer_sharding = OptimizerSharding::kStatesAndGradients;
      break;
    default:
      return Invalid("optimizer_sharding is ",
                     static_cast<int>(proto.optimizer_sharding()),
                     ": must be an OptimizerSharding");
  }
  PW_RETURN_IF_ERROR(ReadDevice(proto, &job));
  PW_RETURN_IF_ERROR(ReadExecutor(proto.executor(), &job.executor));
  const int num_limits = proto.max_microbatch_tokens_size();
  if (num_limits != 0 && num_limits != proto.modules_size()) {
    return Invalid("max_microbatch_tokens has ", num_limits,
                   " values: must be empty or have one for each of the ",
                   proto.modules_size(), " modules");
  }
  job.max_microbatch_tokens.assign(proto.modules_size(), 8192);
  for (int m = 0; m < num_limits; ++m) {
    PW_RETURN_IF_ERROR(InRange(absl::StrCat("max_microbatch_tokens[", m, "]"),
                               proto.max_microbatch_tokens(m), 1,
                               kMaxMicrobatchTokens));
    job.max_microbatch_tokens[m] = proto.max_microbatch_tokens(m);
  }
  if (!job.executor.shape_buckets.empty()) {
    const int64_t largest = job.executor.shape_buckets.back();
    for (int m = 0; m < proto.modules_size(); ++m) {
      if (job.max_microbatch_tokens[m] <= kMostBucketsFilled * largest) {
        continue;
      }
      return Invalid("max_microbatch_tokens[", m, "] is ",
                     job.max_microbatch_tokens[m], ": must be at most ",
                     kMostBucketsFilled,
                     " times the largest of executor.shape_buckets, ", largest);
    }
  }
  return job;
}

absl::StatusOr<Layout> LayoutFromProto(const v1::Layout& proto,
                                       const Job& job) {
  if (proto.modules_size() != static_cast<int>(job.modules.size())) {
    return Invalid("layout.modules has ", proto.modules_size(),
                   " entries: must have one for each of the ",
                   job.modules.size(), " modules");
  }
  const int ranks = job.parallelism.pipeline_parallel;
  Layout layout;
  for (int m = 0; m < proto.modules_size(); ++m) {
    const v1::ModuleLayout& module = proto.modules(m);
    const std::string path = absl::StrCat("layout.modules[", m, "]");
    if (module.module() != job.modules[m].name) {
      return Invalid(path, ".module is \"",
                     absl::CHexEscape(module.module().substr(0, 80)),
                     "\": must be \"", job.modules[m].name,
                     "\", in the order of the job's modules");
    }
    PW_RETURN_IF_ERROR(InRange(absl::StrCat("number of ", path, ".segments"),
                               module.segments_size(), 1,
                               job.executor.max_segments));
    ModuleLayout& out = layout.modules.emplace_back();
    const int num_layers = job.modules[m].NumLayers();
    int next_layer = 0;
    for (int s = 0; s < module.segments_size(); ++s) {
      const v1::PipelineSegment& segment = module.segments(s);
      const std::string at = absl::StrCat(path, ".segments[", s, "].chunks");
      PW_RETURN_IF_ERROR(InRange(absl::StrCat("number of ", at),
                                 segment.chunks_size(), 1, ranks));
      PipelineSegment& out_segment = out.segments.emplace_back();
      const bool descends = segment.chunks_size() > 1 &&
                            segment.chunks(1).rank() < segment.chunks(0).rank();
      if (descends && !job.executor.v_placement) {
        return Invalid(at, "[1].rank is ", segment.chunks(1).rank(),
                       ": ranks of a segment must ascend, since "
                       "executor.v_placement is not set");
      }
      for (int c = 0; c < segment.chunks_size(); ++c) {
        const v1::Chunk& chunk = segment.chunks(c);
        const std::string field = absl::StrCat(at, "[", c, "]");
        PW_RETURN_IF_ERROR(
            InRange(absl::StrCat(field, ".rank"), chunk.rank(), 0, ranks - 1));
        if (c > 0) {
          const int before = segment.chunks(c - 1).rank();
          if (chunk.rank() == before || (chunk.rank() < before) != descends) {
            return Invalid(field, ".rank is ", chunk.rank(), " after ", before,
                           ": ranks of a segment must be distinct and run in "
                           "one direction");
          }
        }
        if (chunk.first_layer() != next_layer) {
          return Invalid(field, ".first_layer is ", chunk.first_layer(),
                         ": must be ", next_layer,
                         ", since chunks hold each layer once and in order");
        }
        PW_RETURN_IF_ERROR(InRange(absl::StrCat(field, ".num_layers"),
                                   chunk.num_layers(), 0,
                                   num_layers - next_layer));
        next_layer += chunk.num_layers();
        out_segment.chunks.push_back(
            {chunk.rank(), chunk.first_layer(), chunk.num_layers()});
      }
    }
    if (next_layer != num_layers) {
      return Invalid(path, ".segments hold ", next_layer,
                     " layers: must hold all ", num_layers, " of module \"",
                     job.modules[m].name, "\"");
    }
    PW_RETURN_IF_ERROR(InRange(absl::StrCat(path, ".sub_microbatch_tokens"),
                               module.sub_microbatch_tokens(), 1,
                               kMaxMicrobatchTokens));
    out.sub_microbatch_tokens = module.sub_microbatch_tokens();
  }
  return layout;
}

v1::Layout LayoutToProto(const Layout& layout, const Job& job) {
  v1::Layout proto;
  for (size_t m = 0; m < layout.modules.size(); ++m) {
    v1::ModuleLayout* module = proto.add_modules();
    module->set_module(job.modules[m].name);
    module->set_sub_microbatch_tokens(layout.modules[m].sub_microbatch_tokens);
    for (const PipelineSegment& segment : layout.modules[m].segments) {
      v1::PipelineSegment* out = module->add_segments();
      for (const Chunk& chunk : segment.chunks) {
        v1::Chunk* c = out->add_chunks();
        c->set_rank(chunk.rank);
        c->set_first_layer(chunk.first_layer);
        c->set_num_layers(chunk.num_layers);
      }
    }
  }
  return proto;
}

}  // namespace pipeweaver::semu
