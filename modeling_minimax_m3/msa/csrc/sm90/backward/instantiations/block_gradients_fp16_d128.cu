#include "../launch_block_gradients.cuh"

template void msa::sm90::launch_block_gradients<__half>(const msa::BackwardParams&,
                                                        const msa::BackwardSchedule&,
                                                        const msa::BackwardSchedule*, cudaStream_t);
