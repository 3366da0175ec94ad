#include "grouped_product.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <limits>
#include <stdexcept>

namespace msa::sm90 {

template <typename Element, bool kGated>
void launch_grouped_product_kernel(const GroupedProductParams& params, cudaStream_t stream);

void launch_grouped_product(const GroupedProductParams& params, cudaStream_t stream) {
  if (params.channels % 8 != 0 || params.channels == 0 ||
      params.outputs % (params.is_gated ? 4 : 2) != 0 ||
      params.num_rows > std::numeric_limits<int>::max()) {
    throw std::runtime_error(
        "grouped_product takes channels that are a multiple of 8, an even number of outputs (of "
        "gated ones also of half of them), and at most 2^31 - 1 rows");
  }
  if (params.num_rows == 0 || params.num_groups == 0 || params.outputs == 0) return;
  if (params.dtype == Dtype::kFloat16) {
    params.is_gated ? launch_grouped_product_kernel<__half, true>(params, stream)
                    : launch_grouped_product_kernel<__half, false>(params, stream);
  } else {
    params.is_gated ? launch_grouped_product_kernel<__nv_bfloat16, true>(params, stream)
                    : launch_grouped_product_kernel<__nv_bfloat16, false>(params, stream);
  }
}

}  // namespace msa::sm90
