#include "../launch_gradients.cuh"

template void msa::sm80::launch_block_gradients<__half, 64>(const msa::BackwardParams&,
                                                            const msa::sm80::BackwardSchedule&,
                                                            cudaStream_t);
