// step_update.h against long double, element by element, and float16.h against exact rounding;
// exits 1 on any failure, 77 where the CPU lacks the instructions this was compiled for.
#include "step_update.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "step_update_cpu.h"

namespace {

using namespace thg;
using namespace thg::THG_VARIANT;
using Floats = std::vector<float>;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t kSlots = 9;
constexpr std::int64_t kWidth = kHead + 4 * kSlots;

int failures = 0;
std::mt19937_64 generator(20);

float normal() { return std::normal_distribution<float>()(generator); }

void expect(bool holds, const char* what, double got, double want, std::int64_t at) {
  if (holds) return;
  if (++failures <= 10) {
    std::printf("%s, element %lld: got %.9g, want %.9g\n", what, static_cast<long long>(at), got,
                want);
  }
}

// The value of a half-precision pattern, by the definition of its format.
long double value_of(unsigned bits, int mantissa_bits, int bias) {
  const unsigned exponent = (bits & 0x7fffU) >> mantissa_bits;
  const unsigned mantissa = bits & ((1U << mantissa_bits) - 1);
  const long double leading = exponent == 0 ? 0 : 1U << mantissa_bits;
  const int scale = static_cast<int>(exponent == 0 ? 1 : exponent) - bias - mantissa_bits;
  return ((bits & 0x8000U) != 0 ? -1 : 1) * std::ldexp(leading + mantissa, scale);
}

template <typename T>
unsigned narrowed(float value) {
  // Nine of them: a whole vector and a rest. What NaN carries may differ.
  const Floats from(9, value);
  T to[9];
  narrow(from.data(), 1.0F, 9, to);
  expect(to[0] == to[8] || std::isnan(value), "vector and rest differ", static_cast<double>(to[0]),
         static_cast<double>(to[8]), 0);
  return static_cast<unsigned>(to[0]);
}

// Every pattern there and back, and between each and the next: the midpoint, which goes to the even
// one, and its two neighbours in float32.
template <typename T>
void test_half(const char* name, int mantissa_bits, int bias, unsigned infinity) {
  for (unsigned bits = 0; bits < 0x10000U; ++bits) {
    const T pattern[9] = {T(bits), T(bits), T(bits), T(bits), T(bits),
                          T(bits), T(bits), T(bits), T(bits)};
    float wide[9];
    widen(pattern, 9, wide);
    const unsigned magnitude = bits & 0x7fffU;
    if (magnitude > infinity) {
      expect(std::isnan(wide[0]) && std::isnan(wide[8]), name, wide[0], kNan, bits);
      expect((narrowed<T>(wide[0]) & 0x7fffU) > infinity, name, narrowed<T>(wide[0]), bits, bits);
      continue;
    }
    expect(narrowed<T>(wide[0]) == bits, name, narrowed<T>(wide[0]), bits, bits);
    if (magnitude == infinity) {
      expect(std::isinf(wide[0]) && wide[0] == wide[8], name, wide[0], INFINITY, bits);
      continue;
    }
    const long double here = value_of(bits, mantissa_bits, bias);
    expect(wide[0] == here && wide[8] == here, name, wide[0], static_cast<double>(here), bits);
    const float middle = static_cast<float>((here + value_of(bits + 1, mantissa_bits, bias)) / 2);
    const unsigned even = bits % 2 == 0 ? bits : bits + 1;
    const float below = std::nextafter(middle, static_cast<float>(here));
    const float above = std::nextafter(middle, 2 * middle);
    expect(narrowed<T>(middle) == even, name, narrowed<T>(middle), even, bits);
    expect(narrowed<T>(below) == bits, name, narrowed<T>(below), bits, bits);
    expect(narrowed<T>(above) == bits + 1, name, narrowed<T>(above), bits + 1, bits);
  }
}

// One call of a single sample. What the row must not read is NaN, and all that it may write.
struct Case {
  std::int64_t numel;
  Floats line = Floats(static_cast<std::size_t>(3 * kWidth), 0.0F);
  Floats registers, output, input, noise, sample;
  std::int32_t cursor[2] = {0, 0}, output_rows[2] = {1, 0}, input_rows[2] = {1, 0};

  Case(std::int64_t size, bool both, std::uint64_t pattern) : numel(size) {
    line[kActive] = 1;
    line[kBoth] = both ? 1 : 0;
    for (std::int64_t c = kGuidance; c <= kStateFromDelta; ++c) {
      line[static_cast<std::size_t>(c)] = (pattern >> c & 1U) != 0 ? normal() : 0.0F;
    }
    const int results[] = {3, 5, both ? 1 : -1, 8, both ? -1 : 1};  // 3 and 5 are read too
    for (int k = 0; k < 5; ++k) line[static_cast<std::size_t>(kSlotSample + k)] = results[k];
    for (std::int64_t k = 0; k < 4 * kSlots; ++k) {
      const bool used = (pattern >> (k % 31) & 1U) != 0 && k % kSlots != 1 && k % kSlots != 8;
      line[static_cast<std::size_t>(kHead + k)] = used ? normal() : 0.0F;
    }
    line[kWidth + kBoth] = 1;
    line[kWidth + kInputScale] = 0.75F;
    registers = filled(kSlots);
    for (std::int64_t s = 0; s < kSlots; ++s) {
      if (!reads(s)) fill(registers, s, kNan);
    }
    output = filled(2);
    if (!both) fill(output, 0, kNan);
    noise = filled(1);
    if (line[kNoise] == 0.0F) fill(noise, 0, kNan);
    input = Floats(static_cast<std::size_t>(2 * numel), kNan);
    sample = Floats(static_cast<std::size_t>(numel), kNan);
  }

  float weight(int kind, std::int64_t slot) const {
    if (kind >= 2 && line[kBoth] != 0.0F) return 0.0F;
    return line[static_cast<std::size_t>(kHead + kind * kSlots + slot)];
  }
  bool reads(std::int64_t slot) const {
    return weight(0, slot) != 0 || weight(1, slot) != 0 || weight(2, slot) != 0 ||
           weight(3, slot) != 0;
  }
  Floats filled(std::int64_t rows) const {
    Floats values(static_cast<std::size_t>(rows * numel));
    for (float& value : values) value = normal();
    return values;
  }
  void fill(Floats& values, std::int64_t row, float value) const {
    for (std::int64_t i = 0; i < numel; ++i) {
      values[static_cast<std::size_t>(row * numel + i)] = value;
    }
  }

  StepArgs arguments() {
    StepArgs args = {};
    args.registers = registers.data();
    args.cursor = cursor;
    args.table = line.data();
    args.model_output = output.data();
    args.output_rows = output_rows;
    args.model_input = input.data();
    args.input_rows = input_rows;
    args.sample = sample.data();
    args.noise = noise.data();
    args.num_slots = kSlots;
    args.num_rows = 3;
    args.batch = 1;
    args.numel = numel;
    args.num_outputs = args.num_inputs = 2;
    args.output_stride = numel;
    args.layout = {1, 1, 1, 0, 0};
    return args;
  }
};

// A value in long double and the sum of the sizes of its terms, which rounding errors go with.
struct Sized {
  long double value = 0, size = 0;
  void add(float weight, Sized term) {
    if (weight == 0.0F) return;
    value += weight * term.value;
    size += std::fabs(weight) * term.size;
  }
};

Sized exact(float value) { return {value, std::fabs(value)}; }

// The five results of table.py for one element, in the order of the SLOT_* columns.
void formula(const Case& before, std::int64_t i, Sized results[5]) {
  const auto at = [&](const Floats& values, std::int64_t row) {
    return exact(values[static_cast<std::size_t>(row * before.numel + i)]);
  };
  const Sized cond = at(before.output, 1);
  Sized delta, guided = cond, state, sample;
  if (before.line[kBoth] != 0.0F) {
    delta.add(1, cond);
    delta.add(-1, at(before.output, 0));
  }
  for (std::int64_t s = 0; s < kSlots; ++s) {
    const Sized past = at(before.registers, s);
    sample.add(before.weight(0, s), past);
    state.add(before.weight(1, s), past);
    delta.add(before.weight(2, s), past);
    delta.add(before.weight(3, s), {cond.value - past.value, cond.size + past.size});
  }
  guided.add(before.line[kGuidance], delta);
  state.add(before.line[kStateFromGuided], guided);
  state.add(before.line[kStateFromDelta], delta);
  sample.add(before.line[kFromGuided], guided);
  sample.add(before.line[kFromCond], cond);
  sample.add(before.line[kFromDelta], delta);
  sample.add(before.line[kFromState], state);
  sample.add(before.line[kNoise], at(before.noise, 0));
  const Sized all[] = {sample, guided, cond, delta, state};
  for (int k = 0; k < 5; ++k) results[k] = all[k];
}

void expect_near(const char* what, float got, Sized want, std::int64_t at) {
  const long double bound = 32 * std::numeric_limits<float>::epsilon() * want.size;
  expect(std::fabs(got - want.value) <= bound, what, got, static_cast<double>(want.value), at);
}

void test_row(std::int64_t numel, bool both, std::uint64_t pattern, bool streaming) {
  Case call(numel, both, pattern);
  const Case before = call;
  const StepArgs args = call.arguments();
  // In two pieces, as two threads would; they meet at a multiple of the block, or nowhere.
  const std::int64_t half = numel / 2 / kTile * kTile;
  Row(args, 0, 0, streaming).run(half);
  Row(args, 0, half, streaming).run(numel);
  for (std::int64_t i = 0; i < numel; ++i) {
    const auto n = static_cast<std::size_t>(i);
    const auto size = static_cast<std::size_t>(numel);
    Sized results[5];
    formula(before, i, results);
    for (int k = 0; k < 5; ++k) {
      const float slot = call.line[static_cast<std::size_t>(kSlotSample + k)];
      if (slot < 0) continue;
      expect_near("slot", call.registers[static_cast<std::size_t>(slot) * size + n], results[k], i);
    }
    expect_near("sample", call.sample[n], results[0], i);
    Sized input;
    input.add(0.75F, results[0]);
    expect_near("input of cond", call.input[size + n], input, i);
    expect(call.input[n] == call.input[size + n], "twin", call.input[n], call.input[size + n], i);
  }
  for (std::int64_t s = 0; s < kSlots; ++s) {
    if (s == 1 || s == 3 || s == 5 || s == 8) continue;
    const std::int64_t begin = s * numel;
    expect(numel == 0 || std::memcmp(&call.registers[static_cast<std::size_t>(begin)],
                                     &before.registers[static_cast<std::size_t>(begin)],
                                     static_cast<std::size_t>(numel) * sizeof(float)) == 0,
           "a slot that the row does not name was changed", 0, 0, s);
  }
}

bool runs_here() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return true;
#endif
}

}  // namespace

int main() {
  if (!runs_here()) return 77;
  test_half<Float16>("float16", 10, 15, 0x7c00U);
  test_half<BFloat16>("bfloat16", 7, 127, 0x7f80U);
  for (const std::int64_t numel : {0, 1, 7, 127, 128, 129, 1000, 8197}) {
    for (std::uint64_t pattern : {0x0ULL, 0x7fffffffULL, 0x2a35c9d3ULL, 0x55caf62cULL}) {
      for (const bool streaming : {false, true}) {
        test_row(numel, true, pattern, streaming);
        test_row(numel, false, pattern, streaming);
      }
    }
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
