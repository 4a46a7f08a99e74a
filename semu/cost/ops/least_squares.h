// Bounded robust least squares for a handful of parameters.

#ifndef SEMU_COST_OPS_LEAST_SQUARES_H_
#define SEMU_COST_OPS_LEAST_SQUARES_H_

#include <functional>
#include <vector>

namespace pipeweaver::semu {

struct Parameter {
  double start = 0;
  double low = 0;
  double high = 0;
};

struct LeastSquaresOptions {
  // Residuals well beyond this count by their size, not by their square, so
  // that outliers are held down (the loss known as soft L1).
  double outlier_scale = 0.1;
  int max_iterations = 100;
};

struct LeastSquaresResult {
  std::vector<double> values;
  double cost = 0;
};

// Minimises the robust sum of squares of `residuals` over the box, by
// Levenberg-Marquardt steps (Nocedal & Wright, Numerical Optimization, 10.3) on
// a numerical Jacobian, clamped to the box. Finds a local minimum near the
// start. Deterministic. `residuals` fills a vector of fixed size and is called
// often.
LeastSquaresResult MinimizeSquares(
    const std::vector<Parameter>& parameters,
    const std::function<void(const std::vector<double>& values,
                             std::vector<double>& residuals)>& residuals,
    const LeastSquaresOptions& options = {});

}  // namespace pipeweaver::semu

#endif  // SEMU_COST_OPS_LEAST_SQUARES_H_
