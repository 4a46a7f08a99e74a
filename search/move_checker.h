// Checks microbatches that were dealt out over the replicas of a step. Shares
// no code with what deals them out.

#ifndef SEARCH_MOVE_CHECKER_H_
#define SEARCH_MOVE_CHECKER_H_

#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "search/microbatch_moves.h"
#include "semu/model/batch.h"

namespace pipeweaver::search {

// Checks that each microbatch of `batches` stands in one place of `moves`, that
// every replica has as many as before, and that `dealt` are the microbatches
// that `moves` names, run as they were submitted (forward only or not). Errors:
// INTERNAL naming replica, place and the rule that is broken.
absl::Status CheckMoves(absl::Span<const semu::Batch* const> batches,
                        const MicrobatchMoves& moves,
                        const std::vector<semu::Batch>& dealt);

}  // namespace pipeweaver::search

#endif  // SEARCH_MOVE_CHECKER_H_
