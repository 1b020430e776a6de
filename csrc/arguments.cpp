#include "arguments.h"

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/headeronly/core/ScalarType.h>

#include <limits>

namespace thg {
namespace {

using torch::headeronly::ScalarType;
using torch::headeronly::toString;

// The sizes of a tensor from dimension `first` on must be those of `like` from `like_first` on.
bool same_sizes(const Tensor& value, std::size_t first, const Tensor& like,
                std::size_t like_first) {
  const auto sizes = value.sizes();
  const auto wanted = like.sizes();
  if (sizes.size() - first != wanted.size() - like_first) return false;
  for (std::size_t k = first; k < sizes.size(); ++k) {
    if (sizes[k] != wanted[k - first + like_first]) return false;
  }
  return true;
}

void check(const char* name, const Tensor& value, ScalarType dtype, const Tensor& registers) {
  STD_TORCH_CHECK(value.scalar_type() == dtype, name, " must be ", toString(dtype), ", not ",
                  toString(value.scalar_type()));
  STD_TORCH_CHECK(value.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(value.device() == registers.device(), name,
                  " must be on the device of the registers");
}

void check_pairs(const char* name, const Tensor& value, const Tensor& registers) {
  check(name, value, ScalarType::Int, registers);
  STD_TORCH_CHECK(value.dim() == 2 && value.size(0) == 2 && value.size(1) == registers.size(1),
                  name, " must have shape (2, ", registers.size(1), ")");
}

Dtype dtype_of(const char* name, const Tensor& value, bool also_float64) {
  const ScalarType dtype = value.scalar_type();
  if (dtype == ScalarType::Float) return Dtype::kFloat32;
  if (dtype == ScalarType::Half) return Dtype::kFloat16;
  if (dtype == ScalarType::BFloat16) return Dtype::kBFloat16;
  STD_TORCH_CHECK(also_float64 && dtype == ScalarType::Double, name,
                  " must be float32, float16 or bfloat16", also_float64 ? " or float64" : "",
                  ", not ", toString(dtype));
  return Dtype::kFloat64;
}

// A contiguous tensor (rows, *latent) in a floating dtype; rows -1: any number.
Dtype check_latents(const char* name, const Tensor& value, const Tensor& registers,
                    std::int64_t rows, bool also_float64) {
  const Dtype dtype = dtype_of(name, value, also_float64);
  check(name, value, value.scalar_type(), registers);
  STD_TORCH_CHECK(value.dim() >= 1 && same_sizes(value, 1, registers, 2), name,
                  " must have the latent shape of the registers");
  STD_TORCH_CHECK(rows < 0 || value.size(0) == rows, name, " must have ", rows, " rows");
  return dtype;
}

void check_registers(const Tensor& registers, const Tensor& table) {
  check("registers", registers, ScalarType::Float, registers);
  STD_TORCH_CHECK(registers.dim() >= 2, "registers must have shape (slots, batch, *latent)");
  const std::int64_t slots = registers.size(0);
  STD_TORCH_CHECK(slots >= 1 && slots <= kMaxSlots, "registers must have 1 to ", kMaxSlots,
                  " slots, not ", slots);
  check("table", table, ScalarType::Float, registers);
  STD_TORCH_CHECK(table.dim() == 2 && table.size(0) >= 1 && table.size(1) == kHead + 4 * slots,
                  "table must have at least one row and ", kHead + 4 * slots, " columns for ",
                  slots, " slots");
}

// Every element that `layout` can reach must lie within a row of the model output.
Layout check_layout(const std::vector<std::int64_t>& given, const Tensor& output,
                    std::int64_t numel) {
  STD_TORCH_CHECK(given.size() == 5, "layout must have 5 numbers, not ", given.size());
  const Layout layout = {given[0], given[1], given[2], given[3], given[4]};
  STD_TORCH_CHECK(layout.n1 >= 1 && layout.n2 >= 1 && layout.s0 >= 0 && layout.s1 >= 0 &&
                      layout.s2 >= 0,
                  "layout must have positive sizes and no negative stride");
  if (numel == 0) return layout;
  // Divided one after the other: their product may not fit 64 bits.
  STD_TORCH_CHECK(numel % layout.n2 == 0 && numel / layout.n2 % layout.n1 == 0,
                  "layout must divide the ", numel, " elements of a sample");
  std::int64_t extent = 0;
  for (std::int64_t k = 1; k < output.dim(); ++k) extent += (output.size(k) - 1) * output.stride(k);
  const std::int64_t counts[] = {numel / layout.n2 / layout.n1 - 1, layout.n1 - 1, layout.n2 - 1};
  const std::int64_t strides[] = {layout.s0, layout.s1, layout.s2};
  std::int64_t left = extent;
  for (int k = 0; k < 3; ++k) {
    STD_TORCH_CHECK(counts[k] == 0 || strides[k] <= left / counts[k],
                    "layout reaches beyond a row of model_output");
    left -= counts[k] * strides[k];
  }
  return layout;
}

void set_output(StepArgs& args, const Tensor& output, const Tensor& registers) {
  args.output_dtype = dtype_of("model_output", output, false);
  STD_TORCH_CHECK(output.device() == registers.device(),
                  "model_output must be on the device of the registers");
  STD_TORCH_CHECK(output.dim() >= 1 && same_sizes(output, 1, registers, 2),
                  "model_output must have the latent shape of the registers");
  args.model_output = output.const_data_ptr();
  args.num_outputs = output.size(0);
  args.output_stride = output.stride(0);
}

void set_inputs(StepArgs& args, const Tensor& registers, const OptionalTensor& model_input,
                const OptionalTensor& timestep, const OptionalTensor& input_rows) {
  if (input_rows) {
    check_pairs("input_rows", *input_rows, registers);
    args.input_rows = static_cast<const std::int32_t*>(input_rows->const_data_ptr());
  }
  // Row numbers must exist in both of them.
  args.num_inputs = std::numeric_limits<std::int64_t>::max();
  if (model_input) {
    args.input_dtype = check_latents("model_input", *model_input, registers, -1, false);
    args.model_input = model_input->mutable_data_ptr();
    args.num_inputs = model_input->size(0);
  }
  if (timestep) {
    check("timestep", *timestep, ScalarType::Float, registers);
    STD_TORCH_CHECK(timestep->dim() == 1, "timestep must have one dimension");
    args.timestep = static_cast<float*>(timestep->mutable_data_ptr());
    if (timestep->size(0) < args.num_inputs) args.num_inputs = timestep->size(0);
  }
}

}  // namespace

StepArgs checked_arguments(const Tensor& registers, const Tensor& cursor, const Tensor& table,
                           const Tensor& model_output, const Tensor& output_rows,
                           const OptionalTensor& model_input, const OptionalTensor& timestep,
                           const OptionalTensor& input_rows, const OptionalTensor& sample,
                           const OptionalTensor& noise, const std::vector<std::int64_t>& layout) {
  check_registers(registers, table);
  check_pairs("cursor", cursor, registers);
  check_pairs("output_rows", output_rows, registers);
  StepArgs args = {};
  args.num_slots = registers.size(0);
  args.batch = registers.size(1);
  args.num_rows = table.size(0);
  args.numel = 1;
  for (std::int64_t k = 2; k < registers.dim(); ++k) args.numel *= registers.size(k);
  set_output(args, model_output, registers);
  args.layout = check_layout(layout, model_output, args.numel);
  set_inputs(args, registers, model_input, timestep, input_rows);
  if (sample) {
    args.sample_dtype = check_latents("sample", *sample, registers, args.batch, true);
    args.sample = sample->mutable_data_ptr();
  }
  if (noise) {
    args.noise_dtype = check_latents("noise", *noise, registers, args.batch, true);
    args.noise = noise->const_data_ptr();
  }
  args.registers = static_cast<float*>(registers.mutable_data_ptr());
  args.cursor = static_cast<std::int32_t*>(cursor.mutable_data_ptr());
  args.table = static_cast<const float*>(table.const_data_ptr());
  args.output_rows = static_cast<const std::int32_t*>(output_rows.const_data_ptr());
  return args;
}

}  // namespace thg
