// What the CUDA backend offers its binding.
#pragma once

#include "step_update_args.h"

namespace thg {

// Launches the next row of every active sample on `stream`, a cudaStream_t of the current device.
// Returns what is wrong with the launch, null if nothing is. A sample that names a denoiser row
// which does not exist counts as one without its output.
const char* step_update_cuda(const StepArgs& args, void* stream);

}  // namespace thg
