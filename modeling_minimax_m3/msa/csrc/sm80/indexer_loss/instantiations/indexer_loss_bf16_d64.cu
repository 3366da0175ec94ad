// spills: numbers that are used once per eight pairs, outside the loop over keys
#include "../launch_kernels.cuh"

template void msa::sm80::launch_block_terms<__nv_bfloat16, 64>(const msa::IndexerLossParams&,
                                                               const msa::IndexerLossSchedule&,
                                                               msa::LossPass, cudaStream_t);
template void msa::sm80::launch_index_gradients<__nv_bfloat16, 64>(const msa::IndexerLossParams&,
                                                                   const msa::IndexerLossSchedule&,
                                                                   cudaStream_t);
