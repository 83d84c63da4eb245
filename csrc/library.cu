// What Python asks the library itself: the page layout, error texts and the size of the argument structs.
#include <cuda_runtime.h>

#include "layout.cuh"
#include "store_kv.h"

// out: byte offsets in a tile record of key plane 0 and 1, value plane 0 and 1 (plane 1: -1 if the width has none), key
// scales, value scales, the bytes of the record, then plane and scales of a key sketch (which need not be there). The offsets
// of tq::Page for widths known at run time.
extern "C" void tq_layout(int key_bits, int value_bits, int head_dim, int sketch, int32_t* out) {
  using namespace tq;
  const int values = codes_bytes(key_bits, head_dim) + (sketch ? plane_bytes(1, head_dim) : 0);
  const int scales = values + codes_bytes(value_bits, head_dim);
  out[0] = 0;
  out[1] = num_planes(key_bits) == 2 ? plane_bytes(plane_bits(key_bits, 0), head_dim) : -1;
  out[2] = values;
  out[3] = num_planes(value_bits) == 2 ? values + plane_bytes(plane_bits(value_bits, 0), head_dim) : -1;
  out[4] = scales;
  out[5] = scales + 2 * TILE_TOKENS;
  out[6] = scales + (sketch ? 6 : 4) * TILE_TOKENS;
  out[7] = codes_bytes(key_bits, head_dim);
  out[8] = scales + 4 * TILE_TOKENS;
}

// out: for each of head_dim coordinates the bit of its field in a word of a plane of `bits` bits, and (plane 4) of its sign.
extern "C" void tq_coordinate_bits(int bits, int head_dim, int32_t* out, int32_t* sign) {
  for (int c = 0; c < head_dim; c++) out[c] = tq::coordinate_bit(bits, c), sign[c] = tq::sign_bit(c);
}

extern "C" const char* tq_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" int tq_store_params_bytes() { return sizeof(tq::StoreParams); }

// The compile-time offsets are the run-time ones.
static_assert(tq::Page<5, 4, 80>::VALUE_PLANE_0 == tq::codes_bytes(5, 80) && tq::Page<4, 4, 128>::SLOT_BYTES == 132);
