#include "tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstdlib>
#include <cstring>
#include <limits>

namespace msa::api {

namespace {

constexpr int64_t kVectorBytes = 16;

}  // namespace

Dtype dtype_of(const char* name, const Tensor& tensor) {
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Half || dtype == ScalarType::BFloat16, "`", name,
                  "` must be float16 or bfloat16, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Half ? Dtype::kFloat16 : Dtype::kBFloat16;
}

int to_int(const char* name, int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), "`", name,
                  "` must fit a 32-bit count, got ", value);
  return static_cast<int>(value);
}

const void* vector_data(const char* name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, "`", name,
                  "` must be contiguous in its last dimension, got stride ", tensor.stride(last));
  const int64_t item = static_cast<int64_t>(tensor.element_size());
  for (int64_t dim = 0; dim < last; ++dim) {
    STD_TORCH_CHECK(tensor.size(dim) <= 1 || tensor.stride(dim) * item % kVectorBytes == 0, "`",
                    name, "` must have strides that are multiples of ", kVectorBytes / item,
                    " elements, got ", tensor.stride(dim), " in dimension ", dim);
  }
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0, "`", name,
                  "` must start at a multiple of ", kVectorBytes, " bytes");
  return data;
}

const int32_t* int32_data(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, "`", name, "` must be int32, got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  STD_TORCH_CHECK(tensor.is_contiguous(), "`", name, "` must be contiguous");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

const int32_t* int32_data(const char* name, const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? int32_data(name, *tensor) : nullptr;
}

Tensor allocate_workspace(const Tensor& like, int64_t elements) {
  return torch::stable::new_empty(like, {elements}, ScalarType::Float);
}

Tensor allocate_workspace_bytes(const Tensor& like, int64_t bytes) {
  constexpr int64_t kFloatBytes = sizeof(float);
  return allocate_workspace(like, (bytes + kFloatBytes - 1) / kFloatBytes);
}

DeviceScope::DeviceScope(const Tensor& tensor)
    : device_(tensor.get_device_index()), guard_(device_) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream));
  stream_ = static_cast<cudaStream_t>(stream);
}

int DeviceScope::num_sms() const {
  return attribute(cudaDevAttrMultiProcessorCount);
}

bool DeviceScope::takes_portable_kernels_only() {
  const char* mode = std::getenv("MINIMAX_M3_MSA_CUDA");
  return mode != nullptr && std::strcmp(mode, "portable") == 0;
}

int DeviceScope::attribute(cudaDeviceAttr name) const {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, name, device_);
  STD_TORCH_CHECK(error == cudaSuccess, "cudaDeviceGetAttribute: ", cudaGetErrorString(error));
  return value;
}

}  // namespace msa::api
