// Kernels that start while the one before them in the stream still runs (programmatic dependent launch, from sm_90 on).
#pragma once
#include <cuda_runtime.h>

namespace tq {

// Until here a kernel may touch nothing that an earlier kernel writes, and nothing that one may still read.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may start. After wait_for_earlier_kernels(), so that it may read what was written before this kernel at once.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Brings a kernel's arguments into the constant cache before the wait: its misses would come one after another.
template <class Arguments> __device__ __forceinline__ void touch_arguments(const Arguments& arguments) {
  if (threadIdx.x < sizeof(Arguments) / 32) {
    const int word = reinterpret_cast<const int*>(&arguments)[8 * threadIdx.x];
    asm volatile("" ::"r"(word));
  }
}

// Enqueues a kernel that calls wait_for_earlier_kernels(), early if its machine code is of an architecture that can.
template <class... Parameters, class... Arguments>
cudaError_t launch_early(void (*kernel)(Parameters...), dim3 grid, int threads, int shared_bytes, cudaStream_t stream,
                         const Arguments&... arguments) {
  cudaFuncAttributes of_kernel{};
  if (const cudaError_t error = cudaFuncGetAttributes(&of_kernel, kernel)) return error;
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes, config.stream = stream;
  config.attrs = &early, config.numAttrs = of_kernel.binaryVersion >= 90 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace tq
