// The operator's schema, and its CPU backend; the CUDA backend is a library of its own, because one
// that needs CUDA does not load beside a torch without it.
#include <torch/csrc/stable/library.h>

#include "arguments.h"
#include "step_update_cpu.h"

namespace thg {
namespace {

// `uses` tells backends what no row of the table does; this one sees it from the weights.
void step_update(Tensor registers, Tensor cursor, Tensor table, Tensor model_output,
                 Tensor output_rows, OptionalTensor model_input, OptionalTensor timestep,
                 OptionalTensor input_rows, OptionalTensor sample, OptionalTensor noise,
                 std::int64_t /*uses*/, std::vector<std::int64_t> layout) {
  step_update_cpu(checked_arguments(registers, cursor, table, model_output, output_rows,
                                    model_input, timestep, input_rows, sample, noise, layout));
}

}  // namespace
}  // namespace thg

// A fragment: Python registers the other operators of this namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(thg_engine, library) {
  library.def(
      "step_update(Tensor(a!) registers, Tensor(b!) cursor, Tensor table, Tensor model_output, "
      "Tensor output_rows, Tensor(c!)? model_input, Tensor(d!)? timestep, Tensor? input_rows, "
      "Tensor(e!)? sample, Tensor? noise, int uses, int[] layout) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(thg_engine, CPU, library) {
  library.impl("step_update", TORCH_BOX(&thg::step_update));
}
