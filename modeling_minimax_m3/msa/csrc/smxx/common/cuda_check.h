// Errors of CUDA calls, as C++ exceptions that say where they came from.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace msa {

inline void check_cuda(cudaError_t status, const char* what, const char* file, int line) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": " + what + ": " +
                           cudaGetErrorString(status));
}

}  // namespace msa

// Throws std::runtime_error when a CUDA runtime call fails.
#define MSA_CHECK_CUDA(call) ::msa::check_cuda((call), #call, __FILE__, __LINE__)

// Throws std::runtime_error when the kernel launch before it was refused.
#define MSA_CHECK_LAUNCH() \
  ::msa::check_cuda(cudaGetLastError(), "kernel launch", __FILE__, __LINE__)
