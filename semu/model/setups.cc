// Set-ups as data: one table of models, one of devices, one of jobs.

#include "semu/model/setups.h"

#include <cstdint>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

namespace pipeweaver::semu {
namespace {

struct Model {
  int layers;
  int64_t hidden;
  int64_t ffn;
  int heads;
  int kv_heads;
  bool gated;
  int64_t vocab;  // 0: not a language model
};

constexpr Model kVit5b = {63, 1792, 15360, 16, 16, false, 0};
constexpr Model kVit22b = {48, 6144, 24576, 48, 48, false, 0};
constexpr Model kLlama8b = {32, 4096, 14336, 32, 8, true, 128256};
constexpr Model kQwen32b = {64, 5120, 27648, 40, 8, true, 152064};
constexpr Model kQwen72b = {80, 8192, 29568, 64, 8, true, 152064};
constexpr Model kGpt175b = {96, 12288, 49152, 96, 96, false, 50257};
constexpr Model kDit5b = {28, 3584, 10240, 28, 28, false, 0};
constexpr Model kDit30b = {48, 6144, 24576, 48, 48, false, 0};
constexpr Model kAudio = {32, 1280, 5120, 20, 20, false, 0};

constexpr int64_t kGb = 1'000'000'000;

struct DeviceSetup {
  const char* name;
  int64_t peak_tflops;
  int64_t memory_gb_per_second;
  int64_t memory_gib;
  int64_t nvlink_gb_per_second;
};

constexpr DeviceSetup kH800 = {"H800-80GB", 989, 3350, 80, 200};
constexpr DeviceSetup kH100 = {"H100-80GB", 989, 3350, 80, 450};
constexpr DeviceSetup kH20 = {"H20-96GB", 148, 4000, 96, 450};

struct Setup {
  const char* name;
  const Model* vision;
  const Model* audio;
  const Model* text;
  const Model* video;
  int tensor_parallel;
  int pipeline_parallel;
  int data_parallel;
  const DeviceSetup* device;
};

constexpr Setup kSetups[] = {
    {"vlm-s", &kVit5b, nullptr, &kLlama8b, nullptr, 4, 4, 1, &kH800},
    {"vlm-m", &kVit5b, nullptr, &kQwen32b, nullptr, 8, 4, 1, &kH800},
    {"vlm-l", &kVit22b, nullptr, &kQwen72b, nullptr, 8, 8, 1, &kH800},
    {"t2v-s", nullptr, nullptr, &kLlama8b, &kDit5b, 4, 4, 1, &kH800},
    {"t2v-l", nullptr, nullptr, &kQwen32b, &kDit30b, 8, 8, 1, &kH800},
    {"vlm-s-h20", &kVit5b, nullptr, &kLlama8b, nullptr, 4, 4, 1, &kH20},
    {"vlm-xl", &kVit22b, nullptr, &kGpt175b, nullptr, 8, 16, 128, &kH100},
    {"t2v-xl", nullptr, nullptr, &kQwen72b, &kDit30b, 8, 8, 96, &kH100},
    {"omni", &kVit5b, &kAudio, &kQwen32b, &kDit5b, 4, 8, 2, &kH100},
};

constexpr absl::string_view kFrozenSuffix = "-frozen";

v1::LayerGroup* AddLayers(v1::Module* module, v1::LayerKind kind, int count,
                          int64_t hidden) {
  v1::LayerGroup* group = module->add_layers();
  group->set_kind(kind);
  group->set_count(count);
  group->set_hidden_size(hidden);
  return group;
}

void AddStack(v1::Module* module, v1::LayerKind kind, const Model& model,
              bool causal) {
  v1::LayerGroup* group = AddLayers(module, kind, model.layers, model.hidden);
  group->set_ffn_size(model.ffn);
  group->set_heads(model.heads);
  group->set_kv_heads(model.kv_heads);
  group->set_gated_ffn(model.gated);
  group->set_causal(causal);
}

v1::Module* AddModule(v1::Job* job, const char* name, v1::Modality modality,
                      int64_t max_tokens) {
  v1::Module* module = job->add_modules();
  module->set_name(name);
  module->set_modality(modality);
  job->add_max_microbatch_tokens(max_tokens);
  return module;
}

void AddEdge(v1::Job* job, const char* producer, const char* consumer,
             int tokens_merged) {
  v1::ModuleEdge* edge = job->add_edges();
  edge->set_producer(producer);
  edge->set_consumer(consumer);
  edge->set_tokens_merged(tokens_merged);
}

void SetLink(v1::Link* link, int64_t latency_ns, int64_t gb_per_second) {
  link->set_latency_ns(latency_ns);
  link->set_bandwidth_bytes_per_second(gb_per_second * kGb);
}

v1::Job Make(const Setup& setup, bool frozen) {
  v1::Job job;
  job.set_name(absl::StrCat(setup.name, frozen ? kFrozenSuffix : ""));

  if (setup.vision != nullptr) {
    // 14 px patches; 48 images of at most 728 x 728 px.
    v1::Module* module =
        AddModule(&job, "vision", v1::MODALITY_IMAGE, 48 * 52 * 52);
    AddLayers(module, v1::LAYER_KIND_PATCH_EMBED, 1, setup.vision->hidden)
        ->set_input_size(3 * 14 * 14);
    AddStack(module, v1::LAYER_KIND_TRANSFORMER, *setup.vision, false);
    module->mutable_token_grid()->set_pixels_per_token_height(14);
    module->mutable_token_grid()->set_pixels_per_token_width(14);
    module->set_frozen(frozen);
  }
  if (setup.audio != nullptr) {
    // 50 tokens a second, as Whisper has; 4 merge on their way.
    v1::Module* module = AddModule(&job, "audio", v1::MODALITY_AUDIO, 32768);
    AddLayers(module, v1::LAYER_KIND_PATCH_EMBED, 1, setup.audio->hidden)
        ->set_input_size(2 * 128);
    AddStack(module, v1::LAYER_KIND_TRANSFORMER, *setup.audio, false);
    module->set_frozen(frozen);
    v1::LayerGroup* projector = AddLayers(
        AddModule(&job, "audio-projector", v1::MODALITY_UNSPECIFIED, 8192),
        v1::LAYER_KIND_PROJECTOR, 1, setup.audio->hidden);
    projector->set_ffn_size(setup.text->hidden);
    projector->set_input_size(setup.text->hidden);
  }
  const bool text_has_loss = setup.vision != nullptr;
  v1::Module* text = AddModule(&job, text_has_loss ? "backbone" : "text",
                               v1::MODALITY_TEXT, 8192);
  AddLayers(text, v1::LAYER_KIND_EMBEDDING, 1, setup.text->hidden)
      ->set_vocab_size(setup.text->vocab);
  AddStack(text, v1::LAYER_KIND_TRANSFORMER, *setup.text, true);
  if (text_has_loss) {
    AddLayers(text, v1::LAYER_KIND_LM_HEAD, 1, setup.text->hidden)
        ->set_vocab_size(setup.text->vocab);
  } else {
    text->set_frozen(frozen);
  }
  if (setup.video != nullptr) {
    // MovieGen: the autoencoder compresses 8x in time and space to 16 channels,
    // patches are 2 x 2. 16 s at 16 FPS and 768 x 768 px, and the padding of
    // other shapes.
    v1::Module* module =
        AddModule(&job, "dit", v1::MODALITY_VIDEO, 32 * 48 * 48 * 9 / 8);
    AddLayers(module, v1::LAYER_KIND_PATCH_EMBED, 1, setup.video->hidden)
        ->set_input_size(16 * 2 * 2);
    AddStack(module, v1::LAYER_KIND_DIT, *setup.video, false);
    module->mutable_token_grid()->set_pixels_per_token_height(16);
    module->mutable_token_grid()->set_pixels_per_token_width(16);
    module->mutable_token_grid()->set_frames_per_token(8);
  }

  if (setup.vision != nullptr) AddEdge(&job, "vision", "backbone", 16);
  if (setup.audio != nullptr) {
    AddEdge(&job, "audio", "audio-projector", 4);
    AddEdge(&job, "audio-projector", "backbone", 1);
  }
  if (setup.video != nullptr) {
    AddEdge(&job, text_has_loss ? "backbone" : "text", "dit", 1);
  }

  v1::Parallelism* parallelism = job.mutable_parallelism();
  parallelism->set_tensor_parallel(setup.tensor_parallel);
  parallelism->set_pipeline_parallel(setup.pipeline_parallel);
  parallelism->set_context_parallel(1);
  parallelism->set_data_parallel(setup.data_parallel);
  job.set_data_type(v1::DATA_TYPE_BF16);
  job.set_optimizer_sharding(v1::OPTIMIZER_SHARDING_STATES);

  v1::Device* device = job.mutable_device();
  device->set_name(setup.device->name);
  device->set_peak_flops_per_second(setup.device->peak_tflops * 1000 * kGb);
  device->set_memory_bandwidth_bytes_per_second(
      setup.device->memory_gb_per_second * kGb);
  device->set_memory_bytes(setup.device->memory_gib << 30);

  v1::Links* links = job.mutable_links();
  SetLink(links->mutable_tensor_parallel(), 2000,
          setup.device->nvlink_gb_per_second);
  SetLink(links->mutable_p2p_intra_node(), 2000,
          setup.device->nvlink_gb_per_second);
  SetLink(links->mutable_p2p_inter_node(), 5000, 25);
  SetLink(links->mutable_host(), 10000, 50);
  links->set_gpus_per_node(8);

  v1::ExecutorCapabilities* executor = job.mutable_executor();
  executor->set_split_backward(true);
  executor->set_selective_recompute(true);
  executor->set_full_recompute(true);
  executor->set_v_placement(true);
  executor->set_batched_p2p(true);
  executor->set_max_receives_ahead(4);
  executor->set_max_segments(4);
  return job;
}

}  // namespace

std::vector<std::string> SetupNames() {
  std::vector<std::string> names;
  for (const Setup& setup : kSetups) {
    names.emplace_back(setup.name);
    names.push_back(absl::StrCat(setup.name, kFrozenSuffix));
  }
  return names;
}

absl::StatusOr<v1::Job> MakeSetup(absl::string_view name) {
  absl::string_view stem = name;
  const bool frozen = absl::ConsumeSuffix(&stem, kFrozenSuffix);
  for (const Setup& setup : kSetups) {
    if (stem == setup.name) return Make(setup, frozen);
  }
  return absl::NotFoundError(absl::StrCat("no set-up is named \"", name,
                                          "\": there are ",
                                          absl::StrJoin(SetupNames(), ", ")));
}

absl::StatusOr<SetupRoles> RolesOf(const v1::Job& job) {
  SetupRoles roles;
  for (int m = 0; m < job.modules_size(); ++m) {
    int* role = nullptr;
    switch (job.modules(m).modality()) {
      case v1::MODALITY_IMAGE:
        role = &roles.vision;
        break;
      case v1::MODALITY_AUDIO:
        role = &roles.audio;
        break;
      case v1::MODALITY_TEXT:
        role = &roles.text;
        break;
      case v1::MODALITY_VIDEO:
        role = &roles.video;
        break;
      default:
        continue;
    }
    if (*role >= 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("modules[", m, "].modality is that of modules[", *role,
                       "]: samples are drawn for one module a modality"));
    }
    *role = m;
  }
  if (roles.text < 0) {
    return absl::InvalidArgumentError(
        "no module has modality text: samples are drawn around a text module");
  }
  const std::string& text = job.modules(roles.text).name();
  for (int e = 0; e < job.edges_size(); ++e) {
    if (job.edges(e).producer() == text && roles.video >= 0 &&
        job.edges(e).consumer() == job.modules(roles.video).name()) {
      roles.text_to_video = e;
    }
    if (job.edges(e).consumer() != text) continue;
    // The producer, or the encoder in front of a module without modality.
    std::string producer = job.edges(e).producer();
    for (int f = 0; f < job.edges_size(); ++f) {
      if (job.edges(f).consumer() == producer)
        producer = job.edges(f).producer();
    }
    if (roles.vision >= 0 && producer == job.modules(roles.vision).name()) {
      roles.vision_to_text = e;
    }
    if (roles.audio >= 0 && producer == job.modules(roles.audio).name()) {
      roles.audio_to_text = e;
    }
  }
  if ((roles.vision >= 0) != (roles.vision_to_text >= 0) ||
      (roles.audio >= 0) != (roles.audio_to_text >= 0) ||
      (roles.video >= 0) != (roles.text_to_video >= 0)) {
    return absl::InvalidArgumentError(
        "edges do not join vision and audio to the text module and it to the "
        "video module: samples are drawn for that shape");
  }
  return roles;
}

}  // namespace pipeweaver::semu
