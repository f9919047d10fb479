// How an operator runs on a device: guard, stream, error check, thread pool; and how it reads and allocates tensors.
// All libraries are built from the same bindings: with -DUSE_CUDA the library of CUDA kernels, with -DINFLECTION_EMULATION
// one for tests, in which the CUDA kernels are compiled as C++ and run on CPU tensors.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <type_traits>

#include "huge_pages.h"
#include "kernels.h"

#ifdef USE_CUDA
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#define INFLECTION_DEVICE_KEY CUDA
#else
#define INFLECTION_DEVICE_KEY CPU
#endif

namespace inflection {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef USE_CUDA
constexpr bool kCuda = true;
template <class Args>
void launch_cuda(int (*kernel)(const Args&, void*), const char* name, const Args& args, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const int error = kernel(args, stream);
  STD_TORCH_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(static_cast<cudaError_t>(error)));
}
// Runs the kernel `stem` on the device of tensor `on`; on the CPU over `items` work items, at least `grain` per thread.
#define INFLECTION_RUN(stem, args, on, items, grain) ::inflection::launch_cuda(&stem##_cuda, #stem, args, on)
#elif defined(INFLECTION_EMULATION)
constexpr bool kCuda = false;
template <class Args>
void launch_emulated(int (*kernel)(const Args&, void*), const char* name, const Args& args) {
  STD_TORCH_CHECK(kernel(args, nullptr) == 0, name, ": the emulated launch failed");
}
#define INFLECTION_RUN(stem, args, on, items, grain) ::inflection::launch_emulated(&stem##_cuda, #stem, args)
#else
#define INFLECTION_CPU_KERNELS
constexpr bool kCuda = false;
template <class Args>
void launch_cpu(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items, int64_t grain) {
  if (items > 0) {
    torch::stable::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  }
}
#define INFLECTION_RUN(stem, args, on, items, grain) ::inflection::launch_cpu(&stem##_cpu, args, items, grain)
#endif

// The schemas of the operators of a file. The CPU library, which is always loaded, defines them; the others only add
// kernels. Fakes and derivatives are registered in inflection_fast/ops.
#ifdef INFLECTION_CPU_KERNELS
#define INFLECTION_SCHEMAS(m) STABLE_TORCH_LIBRARY_FRAGMENT(inflection_fast, m)
#else
#define INFLECTION_SCHEMAS(m) [[maybe_unused]] static void schemas(torch::stable::detail::StableLibrary& m)
#endif

using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Bool: return DType::boolean;
    default: STD_TORCH_CHECK(false, name, ": dtype must be float32, bfloat16, float16 (or bool for a mask)");
  }
}

inline void check_device(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(kCuda ? tensor.is_cuda() : tensor.is_cpu(), name, ": expected a ", kCuda ? "CUDA" : "CPU", " tensor");
}

// Allocates a result or scratch memory, which is not initialised.
inline Tensor new_tensor(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  Tensor tensor = torch::stable::new_empty(like, sizes, dtype);
  if constexpr (!kCuda) ask_for_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}
inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return new_tensor(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), dtype);
}
inline Tensor new_float(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_tensor(like, sizes, ScalarType::Float);
}
inline Tensor new_double(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return new_tensor(like, sizes, ScalarType::Double);
}

// The elements of a tensor; const T: to be read.
template <class T>
T* data(const Tensor& tensor) {
  if constexpr (std::is_const_v<T>) return static_cast<T*>(tensor.const_data_ptr());
  else return static_cast<T*>(tensor.mutable_data_ptr());
}

// The same of an argument, which has to be a contiguous tensor of T with `count` elements (-1: any number) on the device.
template <class T>
T* elements(const Tensor& tensor, const char* name, int64_t count) {
  constexpr ScalarType dtype = torch::headeronly::CppTypeToScalarType<std::remove_const_t<T>>::value;
  check_device(tensor, name);
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.is_contiguous() && (count < 0 || tensor.numel() == count),
                  name, ": expected a contiguous tensor of dtype ", torch::headeronly::toString(dtype), " with ", count,
                  " elements");
  return data<T>(tensor);
}

}  // namespace inflection
