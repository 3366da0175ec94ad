#include "../launch_block_scores.cuh"

template void msa::sm90::launch_block_scores<__half, 64>(const msa::SelectParams&,
                                                         const msa::ScoreSchedule&, cudaStream_t);
