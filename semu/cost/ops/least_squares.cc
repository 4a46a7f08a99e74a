// Bounded robust least squares for a handful of parameters.

#include "semu/cost/ops/least_squares.h"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <utility>

namespace pipeweaver::semu {
namespace {

using Vector = std::vector<double>;

double RobustCost(const Vector& residuals, double scale) {
  double cost = 0;
  for (const double r : residuals) {
    const double z = (r / scale) * (r / scale);
    cost += scale * scale * 2 * (std::sqrt(1 + z) - 1);
  }
  return cost;
}

// Solves matrix * x = right by elimination with pivoting; false if singular.
bool Solve(std::vector<Vector> matrix, Vector right, Vector* x) {
  const std::size_t n = right.size();
  for (std::size_t column = 0; column < n; ++column) {
    std::size_t pivot = column;
    for (std::size_t row = column + 1; row < n; ++row) {
      if (std::abs(matrix[row][column]) > std::abs(matrix[pivot][column]))
        pivot = row;
    }
    if (!(std::abs(matrix[pivot][column]) > 1e-300)) return false;
    std::swap(matrix[pivot], matrix[column]);
    std::swap(right[pivot], right[column]);
    for (std::size_t row = column + 1; row < n; ++row) {
      const double factor = matrix[row][column] / matrix[column][column];
      for (std::size_t k = column; k < n; ++k)
        matrix[row][k] -= factor * matrix[column][k];
      right[row] -= factor * right[column];
    }
  }
  x->assign(n, 0);
  for (std::size_t row = n; row-- > 0;) {
    double sum = right[row];
    for (std::size_t k = row + 1; k < n; ++k) sum -= matrix[row][k] * (*x)[k];
    (*x)[row] = sum / matrix[row][row];
  }
  return true;
}

}  // namespace

LeastSquaresResult MinimizeSquares(
    const std::vector<Parameter>& parameters,
    const std::function<void(const Vector& values, Vector& residuals)>&
        residuals,
    const LeastSquaresOptions& options) {
  const std::size_t n = parameters.size();
  Vector values;
  for (const Parameter& parameter : parameters)
    values.push_back(parameter.start);
  Vector current;
  residuals(values, current);
  double cost = RobustCost(current, options.outlier_scale);

  std::vector<Vector> jacobian(n);
  double damping = 1e-3;
  for (int iteration = 0; iteration < options.max_iterations; ++iteration) {
    for (std::size_t j = 0; j < n; ++j) {
      const Parameter& parameter = parameters[j];
      // The rules have kinks (tiles, waves); a step of a thousandth sees past
      // them.
      double step = 1e-3 * std::max(std::abs(values[j]),
                                    1e-2 * (parameter.high - parameter.low));
      if (values[j] + step > parameter.high) step = -step;
      Vector moved = values;
      moved[j] += step;
      residuals(moved, jacobian[j]);
      for (std::size_t i = 0; i < current.size(); ++i) {
        jacobian[j][i] = (jacobian[j][i] - current[i]) / step;
      }
    }
    std::vector<Vector> normal(n, Vector(n, 0));
    Vector gradient(n, 0);
    for (std::size_t i = 0; i < current.size(); ++i) {
      const double z = current[i] / options.outlier_scale;
      const double weight = 1 / std::sqrt(1 + z * z);
      for (std::size_t j = 0; j < n; ++j) {
        const double scaled = weight * jacobian[j][i];
        gradient[j] += scaled * current[i];
        for (std::size_t k = j; k < n; ++k)
          normal[j][k] += scaled * jacobian[k][i];
      }
    }
    for (std::size_t j = 0; j < n; ++j) {
      for (std::size_t k = 0; k < j; ++k) normal[j][k] = normal[k][j];
    }

    bool improved = false;
    for (int attempt = 0; attempt < 12 && !improved; ++attempt) {
      std::vector<Vector> damped = normal;
      Vector right(n);
      for (std::size_t j = 0; j < n; ++j) {
        damped[j][j] += damping * std::max(normal[j][j], 1e-12);
        right[j] = -gradient[j];
      }
      Vector step;
      Vector moved = values;
      if (Solve(std::move(damped), std::move(right), &step)) {
        for (std::size_t j = 0; j < n; ++j) {
          moved[j] = std::clamp(values[j] + step[j], parameters[j].low,
                                parameters[j].high);
        }
        Vector next;
        residuals(moved, next);
        const double next_cost = RobustCost(next, options.outlier_scale);
        if (next_cost < cost) {
          improved = cost - next_cost > 1e-9 * cost;
          values = std::move(moved);
          current = std::move(next);
          cost = next_cost;
          damping = std::max(damping / 5, 1e-9);
          if (!improved) return {values, cost};
          break;
        }
      }
      damping *= 4;
    }
    if (!improved) break;
  }
  return {values, cost};
}

}  // namespace pipeweaver::semu
