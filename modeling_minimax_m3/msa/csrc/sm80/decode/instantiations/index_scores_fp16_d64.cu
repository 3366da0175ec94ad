#include <cuda_fp16.h>

#include "../index_scores.cuh"

MSA_INSTANTIATE_INDEX_SCORES(__half, 64)
