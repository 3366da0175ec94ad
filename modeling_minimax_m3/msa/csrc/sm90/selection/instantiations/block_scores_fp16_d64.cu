#include "../launch_scores.cuh"

template void msa::sm90::launch_block_scores<__half, 64>(const msa::SelectParams&,
                                                         const msa::sm80::ScoreSchedule&,
                                                         cudaStream_t);
