#include <cuda_bf16.h>

#include "../index_scores.cuh"

MSA_INSTANTIATE_INDEX_SCORES(__nv_bfloat16, 64)
