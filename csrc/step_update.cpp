// C entry points of step_update.h: bindings and checks, no arithmetic.
#include "step_update.h"

#if defined(_WIN32)
#define THG_EXPORT extern "C" __declspec(dllexport)
#else
#define THG_EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace {

// What the entry points return; the caller turns a code into its own error.
enum Status : int { kOk = 0, kNegativeSize = 1, kNullPointer = 2 };

}  // namespace

THG_EXPORT int thg_linear_combination(const float* const* terms, const float* weights,
                                      std::int64_t count, std::int64_t numel, float* out) {
  if (count < 0 || numel < 0) return kNegativeSize;
  if (numel == 0) return kOk;
  if (out == nullptr) return kNullPointer;
  if (count > 0 && (terms == nullptr || weights == nullptr)) return kNullPointer;
  for (std::int64_t k = 0; k < count; ++k) {
    if (weights[k] != 0.0F && terms[k] == nullptr) return kNullPointer;
  }
  thg::linear_combination(terms, weights, count, numel, out);
  return kOk;
}

THG_EXPORT int thg_guided_output(const float* cond, const float* uncond, float gain,
                                 std::int64_t numel, float* delta, float* out) {
  if (numel < 0) return kNegativeSize;
  if (numel == 0) return kOk;
  if (cond == nullptr || uncond == nullptr || out == nullptr) return kNullPointer;
  thg::guided_output(cond, uncond, gain, numel, delta, out);
  return kOk;
}
