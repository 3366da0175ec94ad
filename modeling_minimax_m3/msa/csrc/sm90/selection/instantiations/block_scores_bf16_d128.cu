#include "../launch_block_scores.cuh"

template void msa::sm90::launch_block_scores<__nv_bfloat16, 128>(const msa::SelectParams&,
                                                                 const msa::ScoreSchedule&,
                                                                 cudaStream_t);
