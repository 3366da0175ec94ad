#include <cuda_bf16.h>

#include "../split_attention.cuh"

MSA_INSTANTIATE_SPLIT_ATTENTION(__nv_bfloat16, 64)
