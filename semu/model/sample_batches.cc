// Samples are drawn by inverting the quantile tables, then packed in the order
// in which they were drawn.

#include "semu/model/sample_batches.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <vector>

#include "absl/strings/str_cat.h"
#include "semu/base/limits.h"
#include "semu/base/status_macros.h"
#include "semu/model/setups.h"

namespace pipeweaver::semu {
namespace {

#include "semu/model/sample_quantiles.inc"

constexpr int64_t kTextTokens = 8192;  // of a microbatch
constexpr int kMostImages = 48;
constexpr int kLongerSidePixels = 728;
constexpr double kTokensPerWord = 1.3;
constexpr double kFramesPerSecond = 16;
constexpr double kSpeechTokensPerSecond = 50;

// SplitMix64 (Steele, Lea, Flood 2014): the same numbers everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t Next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  // In [0, 1).
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }

  double Draw(const double (&quantiles)[101]) {
    const double position = Uniform() * 100;
    const int low = static_cast<int>(position);
    return quantiles[low] +
           (position - low) * (quantiles[low + 1] - quantiles[low]);
  }

 private:
  uint64_t state_;
};

struct Image {
  uint32_t height = 0;
  uint32_t width = 0;
};

struct Sample {
  int64_t text_tokens = 0;  // without those of images and speech
  std::vector<Image> images;
  int64_t speech_tokens = 0;  // of the audio encoder; 0: no speech
};

struct Clip {
  uint32_t height = 0;
  uint32_t width = 0;
  uint32_t frames = 0;
};

int64_t TokensOf(double words) {
  return std::max<int64_t>(1, std::llround(words * kTokensPerWord));
}

class Sampler {
 public:
  Sampler(const v1::Job& job, const SetupRoles& roles,
          const SampleOptions& options)
      : job_(job), roles_(roles), options_(options), random_(options.seed) {}

  v1::BatchMetadata Run() {
    v1::BatchMetadata batch;
    for (int b = 0; b < options_.microbatches; ++b) {
      v1::Microbatch* microbatch = batch.add_microbatches();
      if (roles_.vision >= 0 || roles_.audio >= 0) {
        const std::vector<Sample> samples = PackSamples();
        WriteSamples(samples, microbatch);
        if (roles_.video >= 0) {
          WriteVideosFromSamples(static_cast<int>(samples.size()), microbatch);
        }
      } else if (roles_.video >= 0) {
        WriteVideos(microbatch);
      } else {
        WriteSamples(PackSamples(), microbatch);
      }
    }
    return batch;
  }

 private:
  Image DrawImage() {
    const double aspect = random_.Draw(kImageAspect);
    const auto side = [](double pixels) {
      return static_cast<uint32_t>(
          std::clamp<int64_t>(std::llround(pixels), 14, kLongerSidePixels));
    };
    if (aspect >= 1) {
      return {side(kLongerSidePixels / aspect), side(kLongerSidePixels)};
    }
    return {side(kLongerSidePixels), side(kLongerSidePixels * aspect)};
  }

  Sample DrawSample() {
    Sample sample;
    int images = 0;
    const double kind = random_.Uniform();
    if (kind < 0.40) {
      images = 1;
      sample.text_tokens = TokensOf(random_.Draw(kCaptionWords));
    } else if (kind < 0.60) {
      images = 1;
      sample.text_tokens = TokensOf(random_.Draw(kQuestionWords));
    } else if (kind < 0.85) {
      images = static_cast<int>(std::llround(random_.Draw(kInterleavedImages)));
      sample.text_tokens = TokensOf(random_.Draw(kInterleavedWords));
    } else {
      sample.text_tokens = TokensOf(random_.Draw(kConversationWords));
    }
    images = roles_.vision < 0 ? 0 : std::min(images, kMostImages);
    for (int i = 0; i < images; ++i) sample.images.push_back(DrawImage());
    if (roles_.audio >= 0 && random_.Uniform() < 0.2) {
      sample.speech_tokens = std::max<int64_t>(
          1,
          std::llround(random_.Draw(kSpeechSeconds) * kSpeechTokensPerSecond));
    }
    Truncate(&sample);
    return sample;
  }

  int64_t ImageTokens(const Image& image) const {
    const v1::TokenGrid& grid = job_.modules(roles_.vision).token_grid();
    const auto ceil_div = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
    const int64_t patches =
        ceil_div(image.height, grid.pixels_per_token_height()) *
        ceil_div(image.width, grid.pixels_per_token_width());
    return ceil_div(
        patches,
        std::max(1, job_.edges(roles_.vision_to_text).tokens_merged()));
  }

  int64_t SpeechTokens(const Sample& sample) const {
    if (sample.speech_tokens == 0) return 0;
    // Merged on the way to a projector and again behind it.
    int64_t tokens = sample.speech_tokens;
    for (const v1::ModuleEdge& edge : job_.edges()) {
      const bool on_the_way =
          edge.producer() == job_.modules(roles_.audio).name() ||
          edge.producer() == job_.edges(roles_.audio_to_text).producer();
      if (on_the_way) {
        const int64_t merged = std::max(1, edge.tokens_merged());
        tokens = (tokens + merged - 1) / merged;
      }
    }
    return tokens;
  }

  // Tokens of the text module.
  int64_t AllTokens(const Sample& sample) const {
    int64_t tokens = sample.text_tokens + SpeechTokens(sample);
    for (const Image& image : sample.images) tokens += ImageTokens(image);
    return tokens;
  }

  // A loader cuts documents at the sequence length.
  void Truncate(Sample* sample) {
    while (AllTokens(*sample) - sample->text_tokens >= kTextTokens) {
      sample->images.pop_back();
    }
    sample->text_tokens =
        std::min(sample->text_tokens,
                 kTextTokens - (AllTokens(*sample) - sample->text_tokens));
  }

  // The next samples, in order, that fit; those that do not wait for a later
  // microbatch. Bounds come first: while images are missing, samples without
  // any wait too.
  std::vector<Sample> PackSamples() {
    std::vector<Sample> packed;
    int64_t tokens = 0;
    int images = 0;
    const int least = roles_.vision < 0 ? 0 : options_.min_images;
    // Room that images still missing will need, at their largest.
    const auto reserved = [&] {
      return std::max(0, least - images) * int64_t{169};
    };
    const auto take = [&](const Sample& sample) {
      const int count = static_cast<int>(sample.images.size());
      const int64_t more = AllTokens(sample);
      if (images + count > options_.max_images) return false;
      if (images < least && count == 0) return false;
      const int missing = std::max(0, least - images - count);
      if (tokens + more + missing * int64_t{169} > kTextTokens) return false;
      packed.push_back(sample);
      tokens += more;
      images += count;
      return true;
    };
    for (auto it = waiting_.begin(); it != waiting_.end();) {
      it = take(*it) ? waiting_.erase(it) : it + 1;
    }
    // A few misses in a row: full.
    int misses = 0;
    while (misses < 4 || images < least) {
      Sample sample = DrawSample();
      if (take(sample)) {
        misses = 0;
        continue;
      }
      ++misses;
      if (misses > 64 && images < least) {
        // Captioned images do for what is missing.
        sample = Sample();
        sample.text_tokens = std::max<int64_t>(
            1, std::min<int64_t>(16, kTextTokens - tokens - reserved()));
        sample.images.push_back(DrawImage());
        if (!take(sample)) break;
      } else if (waiting_.size() < 64) {
        waiting_.push_back(std::move(sample));
      }
    }
    return packed;
  }

  void WriteSamples(const std::vector<Sample>& samples,
                    v1::Microbatch* microbatch) {
    v1::ModuleItems vision;
    v1::ModuleItems audio;
    v1::ModuleItems text;
    v1::ItemUses images;
    v1::ItemUses speech;
    for (size_t i = 0; i < samples.size(); ++i) {
      const Sample& sample = samples[i];
      text.add_tokens(static_cast<uint32_t>(AllTokens(sample)));
      for (const Image& image : sample.images) {
        images.add_producer_item(vision.height_size());
        images.add_consumer_item(static_cast<uint32_t>(i));
        vision.add_height(image.height);
        vision.add_width(image.width);
      }
      if (sample.speech_tokens > 0) {
        speech.add_producer_item(audio.tokens_size());
        speech.add_consumer_item(static_cast<uint32_t>(i));
        audio.add_tokens(static_cast<uint32_t>(sample.speech_tokens));
      }
    }
    AddItems(roles_.vision, vision, microbatch);
    AddItems(roles_.audio, audio, microbatch);
    AddItems(roles_.text, text, microbatch);
    AddUses(roles_.vision_to_text, images, microbatch);
    AddUses(roles_.audio_to_text, speech, microbatch);
  }

  // Clips of at most `seconds` in all; longer ones are not in the data set.
  // Full after four that do not fit.
  std::vector<Clip> DrawClips(int most, double seconds) {
    std::vector<Clip> clips;
    double used = 0;
    int misses = 0;
    while (static_cast<int>(clips.size()) < most && misses < 4) {
      double length = random_.Draw(kClipSeconds);
      while (length > seconds) length = random_.Draw(kClipSeconds);
      length = std::max(length, 0.5);
      if (used + length > seconds) {
        ++misses;
        continue;
      }
      used += length;
      // About 768 x 768 px in whole latent patches of 16 px.
      const double aspect = std::clamp(random_.Draw(kVideoAspect), 0.4, 2.5);
      const auto side = [](double pixels) {
        return 16 * static_cast<uint32_t>(std::lround(pixels / 16));
      };
      clips.push_back(
          {side(768 / std::sqrt(aspect)), side(768 * std::sqrt(aspect)),
           static_cast<uint32_t>(std::lround(length * kFramesPerSecond))});
    }
    return clips;
  }

  void WriteClips(const std::vector<Clip>& clips, v1::Microbatch* microbatch) {
    v1::ModuleItems video;
    for (const Clip& clip : clips) {
      video.add_height(clip.height);
      video.add_width(clip.width);
      video.add_frames(clip.frames);
    }
    AddItems(roles_.video, video, microbatch);
  }

  void WriteVideos(v1::Microbatch* microbatch) {
    const std::vector<Clip> clips = DrawClips(8, 16);
    v1::ModuleItems text;
    v1::ItemUses prompts;
    for (size_t i = 0; i < clips.size(); ++i) {
      text.add_tokens(
          static_cast<uint32_t>(TokensOf(random_.Draw(kPromptWords))));
      prompts.add_producer_item(static_cast<uint32_t>(i));
      prompts.add_consumer_item(static_cast<uint32_t>(i));
    }
    AddItems(roles_.text, text, microbatch);
    WriteClips(clips, microbatch);
    AddUses(roles_.text_to_video, prompts, microbatch);
  }

  void WriteVideosFromSamples(int samples, v1::Microbatch* microbatch) {
    const std::vector<Clip> clips = DrawClips(std::min(4, samples), 8);
    v1::ItemUses conditions;
    for (size_t i = 0; i < clips.size(); ++i) {
      conditions.add_producer_item(static_cast<uint32_t>(
          random_.Next() % static_cast<uint64_t>(samples)));
      conditions.add_consumer_item(static_cast<uint32_t>(i));
    }
    WriteClips(clips, microbatch);
    AddUses(roles_.text_to_video, conditions, microbatch);
  }

  static void AddItems(int module, const v1::ModuleItems& items,
                       v1::Microbatch* microbatch) {
    if (module < 0 || (items.tokens_size() == 0 && items.height_size() == 0)) {
      return;
    }
    v1::ModuleItems* out = microbatch->add_items();
    *out = items;
    out->set_module(static_cast<uint32_t>(module));
  }

  static void AddUses(int edge, const v1::ItemUses& uses,
                      v1::Microbatch* microbatch) {
    if (edge < 0 || uses.producer_item_size() == 0) return;
    v1::ItemUses* out = microbatch->add_uses();
    *out = uses;
    out->set_edge(static_cast<uint32_t>(edge));
  }

  const v1::Job& job_;
  const SetupRoles roles_;
  const SampleOptions& options_;
  Random random_;
  std::deque<Sample> waiting_;
};

}  // namespace

absl::StatusOr<v1::BatchMetadata> SampleBatch(const v1::Job& job,
                                              const SampleOptions& options) {
  if (options.microbatches < 1 || options.microbatches > kMaxMicrobatches) {
    return absl::InvalidArgumentError(
        absl::StrCat("microbatches is ", options.microbatches,
                     ": must be 1 to ", kMaxMicrobatches));
  }
  if (options.min_images < 0 || options.max_images < options.min_images ||
      options.max_images > kMostImages) {
    return absl::InvalidArgumentError(absl::StrCat(
        "min_images is ", options.min_images, " and max_images ",
        options.max_images, ": must be 0 <= min <= max <= ", kMostImages));
  }
  PW_ASSIGN_OR_RETURN(const SetupRoles roles, RolesOf(job));
  for (const int module : {roles.vision, roles.video}) {
    if (module < 0) continue;
    const v1::TokenGrid& grid = job.modules(module).token_grid();
    if (grid.pixels_per_token_height() < 1 ||
        grid.pixels_per_token_width() < 1) {
      return absl::InvalidArgumentError(absl::StrCat(
          "modules[", module, "].token_grid has pixels_per_token_height = ",
          grid.pixels_per_token_height(),
          " and pixels_per_token_width = ", grid.pixels_per_token_width(),
          ": must both be at least 1, for samples are drawn in pixels"));
    }
  }
  return Sampler(job, roles, options).Run();
}

void SetTraceBounds(int step, SampleOptions* options) {
  const int in_cycle = (step - 1) % 20 + 1;
  if (in_cycle <= 5) {
    options->min_images = 16 * (in_cycle - 1) / 4;
    options->max_images = 32;
  } else {
    options->min_images = 16 * (20 - in_cycle) / 15;
    options->max_images = 32 * (20 - in_cycle) / 15;
  }
}

}  // namespace pipeweaver::semu
