// The write kernel for one head size, -DTQ_HEAD_DIM=128.
#include <cuda_runtime.h>

#include "store_kv.cuh"

#define TQ_JOIN(a, b) a##b
#define TQ_NAME(d) TQ_JOIN(launch_store_kv_, d)

namespace tq {

int TQ_NAME(TQ_HEAD_DIM)(const StoreParams& params, int ctas, int shared_bytes, cudaStream_t stream) {
  const auto kernel = store_kv_kernel<TQ_HEAD_DIM>;
  if (shared_bytes > 48 * 1024) {  // a default limit; raising it again costs nothing
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  kernel<<<dim3(ctas, 2), STORE_THREADS, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace tq
