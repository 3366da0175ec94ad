// What every operator of the API needs: checks of tensors, their sizes and pointers as the kernels
// take them, scratch memory, the device and its stream.
//
// The Python layer has checked shapes, dtypes of the arguments among each other and devices; here
// is what only the kernels' plain params need: alignment, 32-bit counts, contiguous offsets.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "kernel_tables.h"
#include "params.h"

namespace msa::api {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The kernels' dtype of a float16 or bfloat16 tensor; any other is an error.
Dtype dtype_of(const char* name, const Tensor& tensor);

// A size as the kernels count, after a check that it fits 32 bits.
int to_int(const char* name, int64_t value);

// The address of a tensor that kernels read 16 bytes at a time: its base and every stride but the
// last must be multiples of 16 bytes and its last dimension contiguous.
const void* vector_data(const char* name, const Tensor& tensor);

// The address of a contiguous int32 tensor.
const int32_t* int32_data(const char* name, const Tensor& tensor);
const int32_t* int32_data(const char* name, const std::optional<Tensor>& tensor);

// Float scratch memory from torch's allocator; it may be released as soon as the launches that use
// it are on the stream, because the allocator hands it out again in stream order.
Tensor allocate_workspace(const Tensor& like, int64_t elements);
Tensor allocate_workspace_bytes(const Tensor& like, int64_t bytes);

// While it lives, the tensor's device is current; knows its current stream and its size.
class DeviceScope {
 public:
  explicit DeviceScope(const Tensor& tensor);
  cudaStream_t stream() const { return stream_; }
  int num_sms() const;

  // The kernel of a table for a call on this device: a portable one where the environment variable
  // MINIMAX_M3_MSA_CUDA is "portable".
  template <typename Params, typename Kernel, size_t kRows>
  const Kernel& choose(const TableRow<Params, Kernel> (&table)[kRows], const Params& params) const {
    const Capability device{attribute(cudaDevAttrComputeCapabilityMajor),
                            attribute(cudaDevAttrComputeCapabilityMinor)};
    return choose_kernel(table, device, takes_portable_kernels_only(), params);
  }

 private:
  int attribute(cudaDeviceAttr name) const;
  static bool takes_portable_kernels_only();

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

}  // namespace msa::api
