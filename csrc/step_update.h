// One row of a sampling plan on the CPU: the arithmetic of a guided, linear sampler step.
//
//     delta_hat = c - u                          the row evaluates both branches
//               = sum_k w_k D_k + ...            otherwise: a linear combination of registers
//     e_hat     = c + g * delta_hat
//     x_next    = sum_k a_k X_k + sum_k b_k E_k + ...
//
// Registers are float32 and contiguous; header only, C++17, no dependencies. Sums run in double:
// the weights of a multistep row alternate in sign and cancel, so float sums lose digits that the
// float32 registers could hold, while the block below stays in the first-level cache and memory
// traffic, the same either way, sets the time. The result is rounded to float once, at the store.
//
// NaN and infinity propagate from every term that is read, so this must not be compiled with
// -ffast-math.
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(THG_STEP_UPDATE_OPENMP) && !defined(_OPENMP)
#error "THG_STEP_UPDATE_OPENMP needs the compiler's OpenMP flag"
#endif

namespace thg {

// 1,024 doubles = 8 KiB: a quarter of the smallest common first-level cache, which leaves room for
// the terms that stream past, and enough work to hide the loop over the terms.
constexpr std::int64_t kBlock = 1024;

// Calls body(begin, size) for every block of [0, numel); blocks are independent.
template <typename Body>
inline void for_each_block(std::int64_t numel, const Body& body) {
#if defined(THG_STEP_UPDATE_OPENMP)
#pragma omp parallel for schedule(static)
#endif
  for (std::int64_t begin = 0; begin < numel; begin += kBlock) {
    body(begin, std::min(kBlock, numel - begin));
  }
}

// out[i] = sum_k weights[k] * terms[k][i].
//
// A term whose weight is zero is never read and may be a null pointer: a register that no row has
// written yet holds anything. With no nonzero weight, out is zero. `out` may be one of the terms
// (an update in place); ranges that overlap in part are not allowed.
inline void linear_combination(const float* const* terms, const float* weights, std::int64_t count,
                               std::int64_t numel, float* out) {
  for_each_block(numel, [=](std::int64_t begin, std::int64_t size) {
    double sum[kBlock];
    std::fill_n(sum, size, 0.0);
    for (std::int64_t k = 0; k < count; ++k) {
      if (weights[k] == 0.0F) continue;
      const double weight = weights[k];
      const float* term = terms[k] + begin;
      for (std::int64_t i = 0; i < size; ++i) sum[i] += weight * static_cast<double>(term[i]);
    }
    for (std::int64_t i = 0; i < size; ++i) out[begin + i] = static_cast<float>(sum[i]);
  });
}

// delta[i] = cond[i] - uncond[i];  out[i] = cond[i] + gain * (cond[i] - uncond[i]).
//
// `gain` is w - 1 times the boost of the row. `delta` may be null where no later row reads it.
// `out` takes the difference before it is rounded for `delta`. `out` and `delta` may each be one of
// the inputs, but not one another.
inline void guided_output(const float* cond, const float* uncond, float gain, std::int64_t numel,
                          float* delta, float* out) {
  const double scale = gain;
  for_each_block(numel, [=](std::int64_t begin, std::int64_t size) {
    double difference[kBlock];
    double guided[kBlock];
    for (std::int64_t i = 0; i < size; ++i) {
      const double c = cond[begin + i];
      difference[i] = c - static_cast<double>(uncond[begin + i]);
      guided[i] = c + scale * difference[i];
    }
    for (std::int64_t i = 0; i < size; ++i) out[begin + i] = static_cast<float>(guided[i]);
    if (delta == nullptr) return;
    for (std::int64_t i = 0; i < size; ++i) delta[begin + i] = static_cast<float>(difference[i]);
  });
}

}  // namespace thg
