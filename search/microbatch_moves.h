// Who trains on which microbatches of a step.

#ifndef SEARCH_MICROBATCH_MOVES_H_
#define SEARCH_MICROBATCH_MOVES_H_

#include <vector>

namespace pipeweaver::search {

// Where a microbatch came from.
struct MicrobatchOrigin {
  int replica = 0;
  int microbatch = 0;

  bool operator==(const MicrobatchOrigin&) const = default;
};

// Who trains on which microbatches, [replica][microbatch].
using MicrobatchMoves = std::vector<std::vector<MicrobatchOrigin>>;

}  // namespace pipeweaver::search

#endif  // SEARCH_MICROBATCH_MOVES_H_
