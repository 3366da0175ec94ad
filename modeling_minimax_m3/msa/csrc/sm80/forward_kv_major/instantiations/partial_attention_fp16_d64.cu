#include "../launch_partial_attention.cuh"

template void msa::sm80::launch_partial_attention<__half, 64>(const msa::ForwardParams&,
                                                              const msa::KvSchedule&, cudaStream_t);
