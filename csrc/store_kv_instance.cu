// The write kernel for one head size, -DTQ_HEAD_DIM=128.
#include <cuda_runtime.h>

#include <algorithm>

#include "early_start.cuh"
#include "store_kv.cuh"

#define TQ_JOIN(a, b) a##b
#define TQ_NAME(d) TQ_JOIN(launch_store_kv_, d)

namespace tq {

template <int HEAD_DIM, class Ctas> int launch_trellis(const StoreParams& params, const Ctas& ctas_of, cudaStream_t stream) {
  if constexpr (has_trellis(HEAD_DIM)) {
    const int ctas = ctas_of(VectorShape<HEAD_DIM, BLOCKS>::VECTORS, TRELLIS_CTAS);
    return launch_early(store_kv_kernel<HEAD_DIM, BLOCKS>, dim3(ctas, 2), STORE_THREADS, TRELLIS_SHARED_BYTES, stream, params);
  }
  return cudaErrorInvalidValue;
}

int TQ_NAME(TQ_HEAD_DIM)(const StoreParams& params, int multiprocessors, int shared_bytes, cudaStream_t stream) {
  constexpr int WARPS = STORE_THREADS / 32, CTAS = store_ctas(TQ_HEAD_DIM);
  using Narrow = VectorShape<TQ_HEAD_DIM, NARROW>;
  using Wide = VectorShape<TQ_HEAD_DIM, WIDE>;
  const auto items = [&](int vectors) {  // warps of work a role
    return int64_t{(params.num_slots + vectors - 1) / vectors} * params.num_kv_heads;
  };
  const auto ctas_of = [&](int vectors, int most) {
    return static_cast<int>(std::min<int64_t>((items(vectors) + WARPS - 1) / WARPS, std::max(1, multiprocessors * most / 2)));
  };
  if (params.role[0].bits > TRELLIS) return launch_trellis<TQ_HEAD_DIM>(params, ctas_of, stream);
  // Spread a vector over more lanes as long as all vectors are under way at once. Beyond that as many warps as fit and no
  // more, each taking several items.
  constexpr bool HAS_WIDE = Wide::LANES > Narrow::LANES;
  const bool sketch = params.role[0].sketch_gain > 0;  // rare, and would cost the others registers
  const bool wide = HAS_WIDE && !sketch && 2 * items(Wide::VECTORS) <= multiprocessors * WARPS * CTAS;
  const auto kernel = sketch ? store_kv_kernel<TQ_HEAD_DIM, NARROW, true>
                      : wide ? store_kv_kernel<TQ_HEAD_DIM, HAS_WIDE ? WIDE : NARROW>
                             : store_kv_kernel<TQ_HEAD_DIM, NARROW>;
  const int ctas = ctas_of(wide ? Wide::VECTORS : Narrow::VECTORS, CTAS);
  if (shared_bytes > 48 * 1024) {  // a default limit; raising it again costs nothing
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return launch_early(kernel, dim3(ctas, 2), STORE_THREADS, shared_bytes, stream, params);
}

}  // namespace tq
