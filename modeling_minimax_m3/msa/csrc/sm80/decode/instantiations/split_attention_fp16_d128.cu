#include <cuda_fp16.h>

#include "../split_attention.cuh"

MSA_INSTANTIATE_SPLIT_ATTENTION(__half, 128)
