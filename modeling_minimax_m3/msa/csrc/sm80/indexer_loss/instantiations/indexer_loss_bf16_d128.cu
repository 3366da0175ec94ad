// spills: numbers that are used once per eight pairs, outside the loop over keys
#include "../launch.cuh"

template void msa::sm80::launch_block_terms<__nv_bfloat16, 128>(
    const msa::IndexerLossParams&, const msa::sm80::IndexerLossSchedule&, msa::sm80::LossPass,
    cudaStream_t);
template void msa::sm80::launch_index_gradients<__nv_bfloat16, 128>(
    const msa::IndexerLossParams&, const msa::sm80::IndexerLossSchedule&, cudaStream_t);
template void msa::sm80::launch_combine_index_query<__nv_bfloat16, 128>(
    const msa::IndexerLossParams&, const msa::sm80::IndexerLossSchedule&, cudaStream_t);
