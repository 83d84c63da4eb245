// Attention to codes for one head size and block of query rows: -DTQ_HEAD_DIM=128 -DTQ_ROWS=4.
#include <algorithm>

#include "decode.cuh"
#include "merge.cuh"

#define TQ_JOIN(d, r) launch_decode_##d##_##r
#define TQ_NAME(d, r) TQ_JOIN(d, r)

namespace tq {

template <class S> int launch_shape(const DecodeParams* params, DecodeLaunch& launch, cudaStream_t stream) {
  launch.workspace_bytes = 4 * S::PARTIAL_FLOATS * 2 * launch.num_ctas * S::MAX_WARPS;
  if (!params) return cudaSuccess;
  const auto kernel = decode_kernel<S>;
  const int warp_bytes = S::warp_bytes(*params);
  const bool stores = params->store.num_slots > 0;
  if (stores && !NewestToken<S>::EXISTS) return cudaErrorInvalidValue;
  const int table_bytes = stores ? NewestToken<S>::table_bytes(*params) : 0;
  const int warps = std::min(S::MAX_WARPS, (launch.shared_bytes - table_bytes) / warp_bytes);
  if (warps < 1) return cudaErrorInvalidConfiguration;
  const int shared_bytes = warps * warp_bytes + table_bytes;
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes))
    return error;
  if (const cudaError_t error = launch_early(kernel, launch.num_ctas, 32 * warps, shared_bytes, stream, *params, warp_bytes))
    return error;
  const auto merge = [&](bool narrow, int ctas, int warps, auto... arguments) {
    return launch_early(narrow ? merge_kernel<S, true> : merge_kernel<S, false>, ctas, 32 * warps, merge_shared_bytes<S>(warps),
                        stream, *params, arguments...);
  };
  return launch_merge<S>(*params, launch.max_query_len, launch.num_ctas * warps, merge);
}

int TQ_NAME(TQ_HEAD_DIM, TQ_ROWS)(const DecodeParams* params, DecodeLaunch& launch, cudaStream_t stream) {
// Widths of keys and values, key sketch. Blocks of 16 rows and more know no key sketches.
#ifdef TQ_DEFAULT_PRESET  // all that tests compile
#define TQ_PRESETS(X) X(4, 4, 0)
#else
#define TQ_PRESETS(X)                                                                                                        \
  X(8, 8, 0) X(8, 4, 0) X(5, 4, 0) X(4, 4, 0) X(4, 3, 0) X(3, 3, 0) X(3, 2, 0) X(2, 2, 0) X(19, 19, 0) X(18, 18, 0) X(3, 4, 1)
#endif
#define TQ_TRY(K, V, SKETCH)                                                                                                 \
  if constexpr (TQ_ROWS < 16 || !SKETCH)                                                                                     \
    if (launch.key_bits == K && launch.value_bits == V && launch.key_sketch == SKETCH)                                       \
      return launch_shape<Shape<K, V, TQ_HEAD_DIM, TQ_ROWS, SKETCH>>(params, launch, stream);
  TQ_PRESETS(TQ_TRY)
  return cudaErrorInvalidValue;
}

}  // namespace tq
