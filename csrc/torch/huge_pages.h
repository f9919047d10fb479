// Huge pages (2 MiB) for large results.
//
// The allocator takes memory for a large result anew from the system, which clears and maps each page of 4 KiB at its
// first access: these page faults take longer than the computation. Linux uses pages of 2 MiB on request if
// /sys/kernel/mm/transparent_hugepage/enabled is "madvise", and always if it is "always".
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace inflection {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
constexpr size_t kLeastForHugePages = 2 * kHugePage;  // for smaller ones the call costs as much as it saves

// Only whole huge pages inside the memory are requested, so that no additional memory is used. If the system refuses, only
// the time changes.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kLeastForHugePages) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + kHugePage - 1) / kHugePage * kHugePage, end = (at + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace inflection
