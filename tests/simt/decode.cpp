// The decode kernel on a CPU: the sources of csrc with tests/simt/instructions.cuh and empty CUDA headers.
#include "simt.h"

namespace tq {
alignas(128) uint8_t shared[1 << 20];
inline uint32_t load_shared(uint32_t address) { return *reinterpret_cast<const uint32_t*>(shared + address); }
}  // namespace tq
inline uint64_t __cvta_generic_to_shared(const void* at) { return static_cast<const uint8_t*>(at) - tq::shared; }

#include "decode.cuh"
#include "merge.cuh"

template <class S> void run(const tq::DecodeParams& params, const tq::DecodeLaunch& launch, int num_warps) {
  std::memset(tq::shared, 0xff, sizeof tq::shared);
  simt::launch(launch.num_ctas, num_warps, [&] { tq::decode_kernel<S>(params, S::warp_bytes(params)); });
  const auto merge = [&](bool narrow, int ctas, int warps, auto... arguments) {
    const auto kernel = narrow ? tq::merge_kernel<S, true> : tq::merge_kernel<S, false>;
    simt::launch(ctas, warps, [=] { kernel(params, arguments...); });
    return 0;
  };
  tq::launch_merge<S>(params, launch.max_query_len, launch.num_ctas * num_warps, merge);
}

extern "C" int simt_params_bytes() { return sizeof(tq::DecodeParams); }

// Returns 1 if there is no such instantiation.
extern "C" int simt_attention(const tq::DecodeParams* params, const tq::DecodeLaunch* launch, int num_warps) {
#define TQ_TRY_SKETCH(K, V, D, R, SKETCH)                                                                                 \
  if (launch->key_bits == K && launch->value_bits == V && launch->head_dim == D && launch->rows == R &&                   \
      launch->key_sketch == SKETCH) {                                                                                     \
    run<tq::Shape<K, V, D, R, SKETCH>>(*params, *launch, num_warps);                                                       \
    return 0;                                                                                                             \
  }
#define TQ_TRY(K, V, D, R) TQ_TRY_SKETCH(K, V, D, R, 0)
#define TQ_WIDTHS(D, R) \
  TQ_TRY(8, 8, D, R) TQ_TRY(8, 4, D, R) TQ_TRY(5, 4, D, R) TQ_TRY(4, 4, D, R) TQ_TRY(4, 3, D, R) TQ_TRY(3, 3, D, R) TQ_TRY(3, 2, D, R) \
  TQ_TRY(2, 2, D, R) TQ_TRY(19, 19, D, R) TQ_TRY(18, 18, D, R)
  TQ_WIDTHS(128, 4) TQ_WIDTHS(64, 8) TQ_WIDTHS(256, 4)
  TQ_TRY(8, 8, 128, 32) TQ_TRY(5, 4, 128, 32) TQ_TRY(4, 4, 128, 32) TQ_TRY(3, 3, 128, 32) TQ_TRY(19, 19, 128, 32)
  TQ_TRY(4, 4, 64, 4) TQ_TRY(4, 4, 128, 8) TQ_TRY(4, 4, 64, 16) TQ_TRY(4, 4, 64, 32) TQ_TRY(4, 4, 128, 16) TQ_TRY(4, 4, 128, 24) TQ_TRY(19, 19, 128, 24) TQ_TRY(4, 4, 256, 16)
  TQ_TRY(19, 19, 64, 32) TQ_TRY(19, 19, 256, 16)
  TQ_TRY_SKETCH(3, 4, 128, 4, 1) TQ_TRY_SKETCH(3, 4, 64, 8, 1) TQ_TRY_SKETCH(3, 4, 256, 4, 1) TQ_TRY_SKETCH(3, 4, 128, 8, 1)
  return 1;
}
