#include "../launch_block_scores.cuh"

template void msa::sm80::launch_block_scores<__half, 128>(const SelectParams&, const ScoreSchedule&,
                                                          cudaStream_t);
