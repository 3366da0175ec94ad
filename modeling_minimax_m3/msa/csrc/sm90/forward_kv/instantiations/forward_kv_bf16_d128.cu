#include "../launch_partial.cuh"

template void msa::sm90::launch_partial_attention<__nv_bfloat16>(const msa::ForwardParams&,
                                                                 const msa::sm80::KvSchedule&,
                                                                 cudaStream_t);
