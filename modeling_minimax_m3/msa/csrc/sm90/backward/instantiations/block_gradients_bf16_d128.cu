#include "../launch_block_gradients.cuh"

template void msa::sm90::launch_block_gradients<__nv_bfloat16>(const msa::BackwardParams&,
                                                               const msa::sm80::BackwardSchedule&,
                                                               const msa::sm80::BackwardSchedule*,
                                                               cudaStream_t);
