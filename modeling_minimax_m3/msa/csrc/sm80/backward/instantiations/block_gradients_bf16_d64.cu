#include "../launch_block_gradients.cuh"

template void msa::sm80::launch_block_gradients<__nv_bfloat16, 64>(const msa::BackwardParams&,
                                                                   const msa::BackwardSchedule&,
                                                                   cudaStream_t);
