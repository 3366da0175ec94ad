// spills: numbers that are used once per eight pairs, outside the loop over keys
#include "../launch_kernels.cuh"

template void msa::sm80::launch_block_terms<__half, 64>(const msa::IndexerLossParams&,
                                                        const msa::IndexerLossSchedule&,
                                                        msa::LossPass, cudaStream_t);
template void msa::sm80::launch_index_gradients<__half, 64>(const msa::IndexerLossParams&,
                                                            const msa::IndexerLossSchedule&,
                                                            cudaStream_t);
