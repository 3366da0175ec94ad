#include "../launch_part.cuh"

template void msa::sm80::launch_partial_attention<__nv_bfloat16, 128>(const msa::ForwardParams&,
                                                                      const msa::sm80::KvSchedule&,
                                                                      cudaStream_t);
template void msa::sm80::launch_combine_partials<__nv_bfloat16, 128>(const msa::ForwardParams&,
                                                                     const msa::sm80::KvSchedule&,
                                                                     cudaStream_t);
