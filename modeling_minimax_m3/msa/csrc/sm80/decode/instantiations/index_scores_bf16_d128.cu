#include "../launch_index_scores.cuh"

template void msa::sm80::launch_index_scores<__nv_bfloat16, 128>(const msa::DecodeSelectParams&,
                                                                 cudaStream_t);
