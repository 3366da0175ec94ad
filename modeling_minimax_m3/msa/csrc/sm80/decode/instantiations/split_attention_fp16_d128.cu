#include "../launch_split_attention.cuh"

template void msa::sm80::launch_split_attention<__half, 128>(const msa::DecodeAttentionParams&,
                                                             cudaStream_t);
