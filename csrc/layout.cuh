// The page in C++: the byte offsets and bit positions of tq_vllm/format.py, which explains them; a test compares the two.
#pragma once

namespace tq {

constexpr int TILE_TOKENS = 16;
constexpr int TRELLIS = 16;         // a width of TRELLIS + b is b bits a coordinate, trellis-coded
constexpr int SEGMENT_TOKENS = 64;  // a key offset is constant over this many absolute positions

__host__ __device__ constexpr int num_planes(int bits) { return bits == 5 || bits == 3 || bits > TRELLIS ? 2 : 1; }

// Bits a coordinate takes in plane 0 or 1 of a width.
__host__ __device__ constexpr int plane_bits(int bits, int plane) {
  return plane == 1 ? 1 : bits == 5 ? 4 : bits == 3 ? 2 : bits > TRELLIS ? bits - TRELLIS - 1 : bits;
}

__host__ __device__ constexpr int words_per_token(int plane_bits, int head_dim) { return (head_dim * plane_bits + 31) / 32; }

// Bytes of one plane, or of all planes of a width, in a tile record.
__host__ __device__ constexpr int plane_bytes(int plane_bits, int head_dim) {
  return 4 * TILE_TOKENS * words_per_token(plane_bits, head_dim);
}
__host__ __device__ constexpr int codes_bytes(int bits, int head_dim) {
  return plane_bytes(plane_bits(bits, 0), head_dim) + (num_planes(bits) == 2 ? plane_bytes(1, head_dim) : 0);
}

// Place of a token (0..15) among the 16 tokens of a value word.
__host__ __device__ constexpr int value_token_order(int token) { return token % 8 / 2 * 4 + token % 2 + 2 * (token / 8); }

// Bit of coordinate c in its word of a plane; for plane 4 the lowest of the three magnitude bits.
__host__ __device__ constexpr int coordinate_bit(int plane_bits, int c) {
  return plane_bits == 8   ? 8 * (c % 4)
         : plane_bits == 4 ? 4 * (c % 8)
         : plane_bits == 2 ? 4 * (c % 8) + 2 * (c / 8 % 2)
                           : 8 * (c % 4) + 2 * (c / 8 % 4) + c % 8 / 4;
}

// Bit of the sign of coordinate c in its word of plane 4.
__host__ __device__ constexpr int sign_bit(int c) { return 8 * (c % 4) + (c % 8 < 4 ? 7 : 3); }

// The lower bit of coordinate k of the j-th group of a trellis block in its word of plane 1 (coded or, of 2 bits, uncoded) or
// of plane 2 (uncoded: word j % 2 of the block), and there its upper bit.
__host__ __device__ constexpr int trellis_bit(int plane_bits, int j, int k) { return plane_bits == 1 ? 4 * k + j : 4 * k + j / 2 * 2; }
__host__ __device__ constexpr int trellis_top_bit(int j, int k) { return sign_bit(k) - 2 + j / 2 * 2; }

// Byte offsets in a tile record of 16 tokens, SKETCH: with the signs and scales of a key sketch. A key word stands at
// plane + 4 * (token * words + word), a value word at plane + 4 * (word * 16 + value_token_order(token)), a scale at 2 * token.
template <int KEY_BITS, int VALUE_BITS, int HEAD_DIM, bool SKETCH = false>
struct Page {
  static constexpr int KEY_PLANE_0 = 0;
  static constexpr int KEY_PLANE_1 = plane_bytes(plane_bits(KEY_BITS, 0), HEAD_DIM);  // if KEY_BITS has two planes
  static constexpr int SKETCH_PLANE = codes_bytes(KEY_BITS, HEAD_DIM);
  static constexpr int VALUE_PLANE_0 = SKETCH_PLANE + (SKETCH ? plane_bytes(1, HEAD_DIM) : 0);
  static constexpr int VALUE_PLANE_1 = VALUE_PLANE_0 + plane_bytes(plane_bits(VALUE_BITS, 0), HEAD_DIM);
  static constexpr int KEY_SCALE = VALUE_PLANE_0 + codes_bytes(VALUE_BITS, HEAD_DIM);
  static constexpr int VALUE_SCALE = KEY_SCALE + 2 * TILE_TOKENS;
  static constexpr int SKETCH_SCALE = VALUE_SCALE + 2 * TILE_TOKENS;
  static constexpr int TILE_BYTES = SKETCH_SCALE + (SKETCH ? 2 * TILE_TOKENS : 0);
  static constexpr int SLOT_BYTES = TILE_BYTES / TILE_TOKENS;
};

}  // namespace tq
