#include "../launch_partial.cuh"

template void msa::sm90::launch_partial_attention<__half>(const msa::ForwardParams&,
                                                          const msa::sm80::KvSchedule&,
                                                          cudaStream_t);
