// Calls of the CUDA runtime that throw: every error becomes an exception that names the call or the kernel.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fastprune::cuda {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

inline unsigned blocks_for(uint64_t threads, unsigned block) {
  const uint64_t blocks = (threads + block - 1) / block;
  if (blocks > 0x7fffffffu) throw std::invalid_argument("too many weights for one launch");
  return static_cast<unsigned>(blocks);
}

// Starts a kernel unless there is nothing to do; a grid of no blocks would be an error.
template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
            Arguments... arguments) {
  if (blocks == 0) return;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
  check(cudaGetLastError(), name);
}

}  // namespace fastprune::cuda
