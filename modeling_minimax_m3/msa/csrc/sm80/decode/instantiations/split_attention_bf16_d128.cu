#include "../launch_split_attention.cuh"

template void msa::sm80::launch_split_attention<__nv_bfloat16, 128>(
    const msa::DecodeAttentionParams&, cudaStream_t);
