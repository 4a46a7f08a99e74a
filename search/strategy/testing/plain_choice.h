// The plainest choice of how a stage is run, for tests.

#ifndef SEARCH_STRATEGY_TESTING_PLAIN_CHOICE_H_
#define SEARCH_STRATEGY_TESTING_PLAIN_CHOICE_H_

#include <cstdint>

#include "search/problem/problem.h"

namespace pipeweaver::search {

// F of 10 ns, a backward in one piece, and as many bytes after F as during the
// backward.
inline Choice PlainChoice(int64_t backward_ns, int64_t bytes) {
  Choice choice;
  choice.forward_ns = 10;
  choice.input_grad_ns = backward_ns;
  choice.activation_bytes = choice.backward_bytes = bytes;
  return choice;
}

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_TESTING_PLAIN_CHOICE_H_
