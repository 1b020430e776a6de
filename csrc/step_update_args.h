// What one launch of the step is given: the argument list of the operator as plain pointers.
//
// The Python side documents it: kernels/thg_kernels/step_update/op.py has the shapes, table.py the
// columns of a row and the formula. The numbers below are those of table.py.
#pragma once

#include <cstdint>

namespace thg {

enum Column : std::int64_t {
  kActive = 0,
  kBoth = 1,
  kTimestep = 2,
  kInputScale = 3,
  kGuidance = 4,
  kFromGuided = 5,
  kFromCond = 6,
  kFromDelta = 7,
  kFromState = 8,
  kNoise = 9,
  kStateFromGuided = 10,
  kStateFromDelta = 11,
  kSlotSample = 12,
  kSlotGuided = 13,
  kSlotCond = 14,
  kSlotDelta = 15,
  kSlotState = 16,
};

constexpr std::int64_t kHead = 20;
constexpr std::int64_t kMaxSlots = 64;

enum class Dtype : std::int32_t { kFloat32, kFloat16, kBFloat16, kFloat64 };

// Where element n of a sample stands in its row of the model output:
// n / (n1 n2) s0 + n / n2 % n1 s1 + n % n2 s2.
struct Layout {
  std::int64_t n1, n2, s0, s1, s2;
};

constexpr bool is_flat(const Layout& at) {
  return at.n1 == 1 && at.n2 == 1 && at.s0 == 1;
}

struct StepArgs {
  float* registers;              // (num_slots, batch, numel)
  std::int32_t* cursor;          // (2, batch)
  const float* table;            // (num_rows, kHead + 4 num_slots)
  const void* model_output;      // (num_outputs, numel), rows output_stride apart, see layout
  const std::int32_t* output_rows;  // (2, batch)
  void* model_input;             // (num_inputs, numel) or null
  float* timestep;               // (num_inputs) or null
  const std::int32_t* input_rows;  // (2, batch) or null
  void* sample;                  // (batch, numel) or null
  const void* noise;             // (batch, numel) or null
  Dtype output_dtype, input_dtype, sample_dtype, noise_dtype;
  std::int64_t num_slots, num_rows, batch, numel;
  std::int64_t num_outputs, num_inputs, output_stride;
  Layout layout;
};

}  // namespace thg
