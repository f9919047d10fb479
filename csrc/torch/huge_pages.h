// Pages of 2 MiB for memory that is about to be written as a whole.
//
// A result of many megabytes lies in memory that the allocator has just taken from the system, which clears and maps each page
// of 4 KiB when it is touched first: that takes longer than to compute what is written there. Linux does so by 2 MiB at a time
// for whoever asks, where /sys/kernel/mm/transparent_hugepage/enabled says "madvise" (or "always", where all memory has it).
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace inflection {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
constexpr size_t kLeastForHugePages = 2 * kHugePage;  // below, the call costs as much as it saves

// What lies before the first whole page and behind the last one keeps small pages, so that no memory is taken that would not be
// taken otherwise. Where the system does not know or does not grant it, nothing changes but the time.
inline void ask_for_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < kLeastForHugePages) return;
  const uintptr_t at = reinterpret_cast<uintptr_t>(data);
  const uintptr_t begin = (at + kHugePage - 1) / kHugePage * kHugePage, end = (at + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace inflection
