// The write kernel for one head size, -DTQ_HEAD_DIM=128.
#include <cuda_runtime.h>

#include <algorithm>

#include "early_start.cuh"
#include "store_kv.cuh"

#define TQ_JOIN(a, b) a##b
#define TQ_NAME(d) TQ_JOIN(launch_store_kv_, d)

namespace tq {

int TQ_NAME(TQ_HEAD_DIM)(const StoreParams& params, int multiprocessors, int shared_bytes, cudaStream_t stream) {
  constexpr int WARPS = STORE_THREADS / 32, CTAS = store_ctas(TQ_HEAD_DIM);
  using Narrow = VectorShape<TQ_HEAD_DIM, false>;
  using Wide = VectorShape<TQ_HEAD_DIM, true>;
  const auto items = [&](int vectors) {  // warps of work a role
    return int64_t{(params.num_slots + vectors - 1) / vectors} * params.num_kv_heads;
  };
  // Spread a vector over more lanes as long as all vectors are under way at once. Beyond that as many warps as fit and no
  // more, each taking several items.
  constexpr bool HAS_WIDE = Wide::LANES > Narrow::LANES;
  const bool wide = HAS_WIDE && 2 * items(Wide::VECTORS) <= multiprocessors * WARPS * CTAS;
  const auto kernel = wide ? store_kv_kernel<TQ_HEAD_DIM, HAS_WIDE> : store_kv_kernel<TQ_HEAD_DIM, false>;
  const int64_t wanted = (items(wide ? Wide::VECTORS : Narrow::VECTORS) + WARPS - 1) / WARPS;
  const int ctas = static_cast<int>(std::min<int64_t>(wanted, std::max(1, multiprocessors * CTAS / 2)));
  if (shared_bytes > 48 * 1024) {  // a default limit; raising it again costs nothing
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  return launch_early(kernel, dim3(ctas, 2), STORE_THREADS, shared_bytes, stream, params);
}

}  // namespace tq
