#include "sm90/grouped_product/launch_grouped_product.cuh"

namespace msa::sm90 {

template void launch_grouped_product_kernel<__nv_bfloat16, true>(const GroupedProductParams&,
                                                                 cudaStream_t);
template void launch_grouped_product_kernel<__nv_bfloat16, false>(const GroupedProductParams&,
                                                                  cudaStream_t);

}  // namespace msa::sm90
