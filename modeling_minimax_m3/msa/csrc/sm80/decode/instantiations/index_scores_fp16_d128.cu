#include "../launch_index_scores.cuh"

template void msa::sm80::launch_index_scores<__half, 128>(const msa::DecodeSelectParams&,
                                                          cudaStream_t);
