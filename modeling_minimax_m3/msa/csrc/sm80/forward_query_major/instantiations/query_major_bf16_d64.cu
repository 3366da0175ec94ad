#include "../launch_query_major.cuh"

template void msa::sm80::launch_query_major<__nv_bfloat16, 64>(const msa::ForwardParams&,
                                                               const msa::TileOrder*, cudaStream_t);
