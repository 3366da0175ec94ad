#include "../launch_forward.cuh"

template void msa::sm80::launch_forward_kernel<__half, 128>(const msa::ForwardParams&,
                                                            const msa::sm80::TileOrder*,
                                                            cudaStream_t);
