#include "../launch_forward_q.cuh"

template void msa::sm90::launch_forward_q_kernel<__nv_bfloat16>(const msa::ForwardParams&,
                                                                const msa::sm80::TileOrder*,
                                                                cudaStream_t);
