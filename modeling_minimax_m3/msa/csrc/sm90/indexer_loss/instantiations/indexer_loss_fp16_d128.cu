// spills: numbers that are used once per eight pairs, outside the loop over products
#include "../launch_kernels.cuh"

template void msa::sm90::launch_block_terms<__half>(const msa::IndexerLossParams&,
                                                    const msa::IndexerLossSchedule&, msa::LossPass,
                                                    cudaStream_t);
template void msa::sm90::launch_index_gradients<__half>(const msa::IndexerLossParams&,
                                                        const msa::IndexerLossSchedule&,
                                                        cudaStream_t);
