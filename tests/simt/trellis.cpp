// The search of csrc/trellis.cuh, which no other lane takes part in, on a CPU.
#include "trellis.cuh"

template <int BITS> void run(const float* blocks, int n, float cells, uint32_t* words, float* sums) {
  for (int i = 0; i < n; i++, blocks += tq::TRELLIS_BLOCK, words += 3, sums += 3) {
    float metric[tq::TRELLIS_STATES];
    tq::search_forward<BITS, 1>(blocks, cells, metric);
    sums[0] = tq::least(metric), sums[1] = sums[2] = 0;
    const tq::TrellisWords found =
        tq::quantize_along<BITS, 1>(blocks, cells, tq::closest_path<BITS, 1>(blocks, cells), sums[1], sums[2]);
    words[0] = found.uncoded[0], words[1] = found.uncoded[1], words[2] = found.coded;
  }
}

// blocks [n][32]; words [n][3]: uncoded, uncoded (3 bits), coded; sums [n][3]: distance of the best open path, <y, level>,
// <level, level>.
extern "C" void simt_trellis(int bits, const float* blocks, int n, float cells, uint32_t* words, float* sums) {
  (bits == 2 ? run<tq::TRELLIS + 2> : run<tq::TRELLIS + 3>)(blocks, n, cells, words, sums);
}
