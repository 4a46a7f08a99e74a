#include "search/move_checker.h"

#include <cstddef>
#include <string>

#include "absl/strings/str_cat.h"

namespace pipeweaver::search {
namespace {

template <typename... Parts>
absl::Status Broken(const Parts&... parts) {
  return absl::InternalError(absl::StrCat("moves: ", parts...));
}

}  // namespace

absl::Status CheckMoves(absl::Span<const semu::Batch* const> batches,
                        const MicrobatchMoves& moves,
                        const std::vector<semu::Batch>& dealt) {
  const size_t replicas = batches.size();
  if (moves.size() != replicas || dealt.size() != replicas) {
    return Broken(moves.size(), " replicas with ", dealt.size(),
                  " batches, must be as many as submitted, ", replicas);
  }
  std::vector<std::vector<bool>> taken;
  for (const semu::Batch* batch : batches) {
    taken.emplace_back(batch->microbatches.size(), false);
  }
  for (size_t to = 0; to < replicas; ++to) {
    const size_t count = batches[to]->microbatches.size();
    if (moves[to].size() != count || dealt[to].microbatches.size() != count) {
      return Broken("replica ", to, " has ", moves[to].size(), " places and ",
                    dealt[to].microbatches.size(),
                    " microbatches, must have as many as it submitted, ",
                    count);
    }
    for (size_t place = 0; place < count; ++place) {
      const MicrobatchOrigin& from = moves[to][place];
      const std::string at =
          absl::StrCat("replica ", to, ", place ", place, ": microbatch ",
                       from.microbatch, " of replica ", from.replica);
      if (from.replica < 0 || from.replica >= static_cast<int>(replicas) ||
          from.microbatch < 0 ||
          from.microbatch >= static_cast<int>(taken[from.replica].size())) {
        return Broken(at, " does not exist");
      }
      if (taken[from.replica][from.microbatch]) {
        return Broken(at, " stands in two places");
      }
      taken[from.replica][from.microbatch] = true;
      const semu::Batch& submitted = *batches[from.replica];
      if (dealt[to].forward_only != submitted.forward_only) {
        return Broken(at, " was submitted with another forward_only");
      }
      if (dealt[to].microbatches[place] !=
          submitted.microbatches[from.microbatch]) {
        return Broken(at, " is not what was dealt out");
      }
    }
  }
  // As many places as microbatches, none twice: none is left out.
  return absl::OkStatus();
}

}  // namespace pipeweaver::search
