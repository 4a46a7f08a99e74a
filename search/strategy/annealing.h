// Simulated annealing (Kirkpatrick et al. 1983) with makespans as energies.

#ifndef SEARCH_STRATEGY_ANNEALING_H_
#define SEARCH_STRATEGY_ANNEALING_H_

#include <cmath>
#include <cstdint>
#include <random>

namespace pipeweaver::search {

// The longest makespan, in ns, that a schedule of `makespan_ns` may be replaced
// by: drawn anew for every proposal, so that one longer by the share
// `temperature` is taken with a chance of 1/e (Metropolis et al. 1953). Known
// before the schedule is, which can be given up once it is longer.
// REQUIRES: makespan_ns below 2^62, 0 <= temperature < 0.02.
inline int64_t BearableNs(int64_t makespan_ns, double temperature,
                          std::mt19937_64& random) {
  const double chance = static_cast<double>((random() >> 11) + 1) * 0x1p-53;
  return makespan_ns + static_cast<int64_t>(-std::log(chance) * temperature *
                                            static_cast<double>(makespan_ns));
}

}  // namespace pipeweaver::search

#endif  // SEARCH_STRATEGY_ANNEALING_H_
