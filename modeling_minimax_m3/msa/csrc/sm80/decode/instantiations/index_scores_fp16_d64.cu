#include "../launch_index_scores.cuh"

template void msa::sm80::launch_index_scores<__half, 64>(const msa::DecodeSelectParams&,
                                                         cudaStream_t);
