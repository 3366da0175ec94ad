#include "../launch_partial_attention.cuh"

template void msa::sm80::launch_partial_attention<__nv_bfloat16, 64>(const msa::ForwardParams&,
                                                                     const msa::KvSchedule&,
                                                                     cudaStream_t);
