// The operator's arguments: its signature, and the checks that protect memory.
//
// Shapes are in kernels/thg_kernels/step_update/op.py. Whoever calls the operator directly gets no
// other checks than these; the Python function step_update() checks what the arguments mean.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "step_update_args.h"

namespace thg {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The arguments as pointers into memory that a launch can neither read nor write outside of, as
// far as shapes, dtypes and strides tell. Row numbers inside the tensors are the launch's to check.
// Raises std::runtime_error that names the argument.
StepArgs checked_arguments(const Tensor& registers, const Tensor& cursor, const Tensor& table,
                           const Tensor& model_output, const Tensor& output_rows,
                           const OptionalTensor& model_input, const OptionalTensor& timestep,
                           const OptionalTensor& input_rows, const OptionalTensor& sample,
                           const OptionalTensor& noise, const std::vector<std::int64_t>& layout);

}  // namespace thg
