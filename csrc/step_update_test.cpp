// Values of step_update.h against long double, term by term; exits 1 on any failure.
#include "step_update.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <random>
#include <vector>

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr std::int64_t kSizes[] = {0, 1, 7, 1023, 1024, 1025, 40961};

int failures = 0;
std::mt19937_64 generator(20);

std::vector<float> random_floats(std::int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(size));
  for (float& value : values) value = normal(generator);
  return values;
}

// One float rounding of the exact value, plus what the double sum may lose before it.
void expect_near(const char* what, std::int64_t size, std::int64_t i, float got, long double want,
                 long double magnitude) {
  const long double bound = 0.501L * std::numeric_limits<float>::epsilon() * std::fabs(want) +
                            16.0L * std::numeric_limits<double>::epsilon() * magnitude;
  if (std::fabs(static_cast<long double>(got) - want) <= bound) return;
  if (++failures <= 5) {
    std::printf("%s, size %lld, element %lld: got %.9g, want %.12Lg\n", what,
                static_cast<long long>(size), static_cast<long long>(i),
                static_cast<double>(got), want);
  }
}

// The weights of an Adams-Bashforth row, which cancel, with zeros over NaN-filled or null terms.
void test_linear_combination(std::int64_t size) {
  const std::vector<float> weights = {1.25F, 0.0F, 55.0F / 24, -59.0F / 24, 37.0F / 24, -0.0F};
  std::vector<std::vector<float>> values;
  std::vector<const float*> terms;
  for (float weight : weights) {
    values.push_back(random_floats(size));
    if (weight == 0.0F) values.back().assign(static_cast<std::size_t>(size), kNan);
  }
  for (const auto& value : values) terms.push_back(value.data());
  terms.back() = nullptr;
  std::vector<float> out(static_cast<std::size_t>(size), kNan);
  thg::linear_combination(terms.data(), weights.data(), 6, size, out.data());
  for (std::int64_t i = 0; i < size; ++i) {
    long double want = 0, magnitude = 0;
    for (std::size_t k = 0; k < weights.size(); ++k) {
      if (weights[k] == 0.0F) continue;
      const long double part = static_cast<long double>(weights[k]) * terms[k][i];
      want += part;
      magnitude += std::fabs(part);
    }
    expect_near("linear_combination", size, i, out[static_cast<std::size_t>(i)], want, magnitude);
  }
}

void test_in_place(std::int64_t size) {
  std::vector<float> x = random_floats(size);
  const std::vector<float> before = x, e = random_floats(size);
  const float* terms[] = {x.data(), e.data()};
  const float weights[] = {0.75F, -0.5F};
  thg::linear_combination(terms, weights, 2, size, x.data());
  for (std::size_t i = 0; i < x.size(); ++i) {
    const long double want = 0.75L * before[i] - 0.5L * e[i];
    expect_near("in place", size, static_cast<std::int64_t>(i), x[i], want, 2.0L);
  }
}

void test_nothing_to_sum(std::int64_t size) {
  std::vector<float> out(static_cast<std::size_t>(size), kNan);
  thg::linear_combination(nullptr, nullptr, 0, size, out.data());
  for (std::size_t i = 0; i < out.size(); ++i) {
    expect_near("no terms", size, static_cast<std::int64_t>(i), out[i], 0.0L, 0.0L);
  }
}

void test_guided_output(std::int64_t size, bool keep_delta) {
  const std::vector<float> cond = random_floats(size), uncond = random_floats(size);
  std::vector<float> out(cond.size(), kNan), delta(cond.size(), kNan);
  const float gain = 6.5F;
  thg::guided_output(cond.data(), uncond.data(), gain, size, keep_delta ? delta.data() : nullptr,
                     out.data());
  for (std::size_t i = 0; i < cond.size(); ++i) {
    const auto at = static_cast<std::int64_t>(i);
    const long double difference = static_cast<long double>(cond[i]) - uncond[i];
    const long double magnitude = std::fabs(cond[i]) + gain * std::fabs(difference);
    expect_near("guided output", size, at, out[i], cond[i] + gain * difference, magnitude);
    if (keep_delta) expect_near("delta", size, at, delta[i], difference, magnitude);
  }
}

}  // namespace

int main() {
  for (const std::int64_t size : kSizes) {
    test_linear_combination(size);
    test_in_place(size);
    test_nothing_to_sum(size);
    test_guided_output(size, true);
    test_guided_output(size, false);
  }
  std::printf("%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
