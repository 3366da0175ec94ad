#include "../launch_forward.cuh"

template void msa::sm80::launch_forward_kernel<__half, 128>(const ForwardParams&, cudaStream_t);
