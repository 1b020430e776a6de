// The operator's CUDA backend; its schema is in the library of binding.cpp, which is loaded first.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "step_update_cuda.h"

namespace thg {
namespace {

// `uses` tells backends what no row of the table does; this one sees it from the weights.
void step_update(Tensor registers, Tensor cursor, Tensor table, Tensor model_output,
                 Tensor output_rows, OptionalTensor model_input, OptionalTensor timestep,
                 OptionalTensor input_rows, OptionalTensor sample, OptionalTensor noise,
                 std::int64_t /*uses*/, std::vector<std::int64_t> layout) {
  const StepArgs args = checked_arguments(registers, cursor, table, model_output, output_rows,
                                          model_input, timestep, input_rows, sample, noise, layout);
  const torch::stable::accelerator::DeviceGuard guard(registers.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(registers.get_device_index(), &stream) == 0,
                  "torch gives no CUDA stream");
  const char* problem = step_update_cuda(args, stream);
  STD_TORCH_CHECK(problem == nullptr, "step_update cannot be launched: ", problem);
}

}  // namespace
}  // namespace thg

STABLE_TORCH_LIBRARY_IMPL(thg_engine, CUDA, library) {
  library.impl("step_update", TORCH_BOX(&thg::step_update));
}
