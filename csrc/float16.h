// float16 and bfloat16 to and from float32, in loops that vectorise.
//
// The functions of one element are plain integer arithmetic without branches, so that a compiler
// can vectorise a loop over them for any instruction set. F16C has float16 in hardware: there the
// loops use it. Rounding is to nearest, ties to even; NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Tells the compiler that iterations are independent: no check for overlap at run time, and a
// result may be written over an operand of the same element.
#if defined(__clang__)
#define THG_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define THG_INDEPENDENT _Pragma("GCC ivdep")
#else
#define THG_INDEPENDENT
#endif

// Each set of instructions compiles this into a namespace of its own: the linker would otherwise
// take one copy of an inline function for all, and that of AVX-512 does not run everywhere.
#ifndef THG_VARIANT
#define THG_VARIANT portable
#endif

namespace thg {
namespace THG_VARIANT {

// Enumerations, not structs: compilers vectorise copies of scalars only.
enum class Float16 : std::uint16_t {};
enum class BFloat16 : std::uint16_t {};

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float to_float(float value) { return value; }
inline float to_float(double value) { return static_cast<float>(value); }
inline float to_float(BFloat16 value) {
  return float_of(static_cast<std::uint32_t>(value) << 16);
}

inline float to_float(Float16 value) {
  const std::uint32_t sign = (static_cast<std::uint32_t>(value) & 0x8000U) << 16;
  const std::uint32_t magnitude = (static_cast<std::uint32_t>(value) & 0x7fffU) << 13;
  // Exponents are 15 too high in float16 and 127 in float32.
  const std::uint32_t normal = magnitude + ((127U - 15U) << 23);
  // A subnormal is a multiple of 2^-24: give it the exponent of 2^-14 and take that one off again.
  const std::uint32_t subnormal =
      bits_of(float_of(magnitude + (113U << 23)) - float_of(113U << 23));
  const std::uint32_t special = magnitude | 0x7f800000U;
  std::uint32_t bits = magnitude < (1U << 23) ? subnormal : normal;
  bits = magnitude >= (31U << 23) ? special : bits;
  return float_of(bits | sign);
}

inline void from_float(float value, float& to) { to = value; }
inline void from_float(float value, double& to) { to = value; }

inline void from_float(float value, BFloat16& to) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t rounded = bits + 0x7fffU + ((bits >> 16) & 1U);
  const bool is_nan = (bits & 0x7fffffffU) > 0x7f800000U;
  to = static_cast<BFloat16>((is_nan ? bits | 0x400000U : rounded) >> 16);
}

inline void from_float(float value, Float16& to) {
  const std::uint32_t bits = bits_of(value);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  // 13 mantissa bits go; half a unit of what stays, less one where that is even, makes the carry.
  const std::uint32_t carried = magnitude + 0xfffU + ((magnitude >> 13) & 1U);
  const std::uint32_t normal = (carried - ((127U - 15U) << 23)) >> 13;
  // Floats from 0.5 to 1 are 2^-24 apart, as float16 subnormals are: adding 0.5 rounds to them.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5F) - bits_of(0.5F);
  std::uint32_t half = magnitude < (113U << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000U ? 0x7c00U : half;  // from 65,520 on: infinity
  half = magnitude > 0x7f800000U ? 0x7e00U : half;
  to = static_cast<Float16>(half | ((bits >> 16) & 0x8000U));
}

// to[i] = from[i], in float32.
template <typename T>
inline void widen(const T* from, std::int64_t size, float* to) {
  THG_INDEPENDENT
  for (std::int64_t i = 0; i < size; ++i) to[i] = to_float(from[i]);
}

// to[i] = scale * from[i], rounded once more to T.
template <typename T>
inline void narrow(const float* from, float scale, std::int64_t size, T* to) {
  THG_INDEPENDENT
  for (std::int64_t i = 0; i < size; ++i) from_float(scale * from[i], to[i]);
}

#if defined(__F16C__)
template <>
inline void widen<Float16>(const Float16* from, std::int64_t size, float* to) {
  const std::int64_t whole = size - size % 8;
  for (std::int64_t i = 0; i < whole; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(halves));
  }
  for (std::int64_t i = whole; i < size; ++i) to[i] = to_float(from[i]);
}

template <>
inline void narrow<Float16>(const float* from, float scale, std::int64_t size, Float16* to) {
  const __m256 factor = _mm256_set1_ps(scale);
  const std::int64_t whole = size - size % 8;
  for (std::int64_t i = 0; i < whole; i += 8) {
    const __m256 value = _mm256_mul_ps(factor, _mm256_loadu_ps(from + i));
    const __m128i halves = _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), halves);
  }
  for (std::int64_t i = whole; i < size; ++i) from_float(scale * from[i], to[i]);
}
#endif

}  // namespace THG_VARIANT
}  // namespace thg
