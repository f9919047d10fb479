// The execution model of CUDA on one CPU thread, enough to run this package's kernels in their own source.
//
// A block's threads are fibers. One runs until it meets a barrier or a warp operation; a barrier opens when every
// thread of the block waits at it, a warp operation when every lane of its mask does. Between two of those the threads
// run one after another, in an order that is shuffled anew every time, so code that relies on some order gives
// different results in different runs. Dynamic shared memory is allocated to the byte and filled with NaN before every
// block; asynchronous copies arrive as late as they may, when they are waited for. 2^x errs by as much as the manual
// allows.
//
// An error, reported with block, thread and source line, ends the program: a barrier or a warp operation that a part of
// its threads never reaches (because they ended, or wait somewhere else), lanes of one warp operation that disagree
// about its mask or its place in the source, a thread that ends before its copies have arrived, and more threads or
// shared memory than a device has.
//
// What it cannot show: the order of memory operations between real warps (everything here is sequentially consistent),
// bank conflicts, coalescing, occupancy, speed, the true rounding of sums inside tensor cores (here: one cut-off for 16
// products), and anything about clusters. What it has of Hopper's own instructions stands in hopper.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulator {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;         // of a block
constexpr size_t kMaxShared = 227 << 10;  // bytes of a block on Hopper
constexpr size_t kLargestPayload = 128;   // bytes that a lane hands to a warp operation
constexpr int kMultiprocessors = 3;       // what a kernel is told that divides its work among them

struct Place {  // where in the source a thread waits
  const char* what;
  const char* file;
  int line;
};

struct Thread {
  uint3 index;
  int linear;  // number within the block
};

const Thread& thread();
const uint3& block_index();
const dim3& block_size();
const dim3& grid_size();
void* shared_memory();
unsigned shared_offset(const void* address);  // from the beginning of shared memory

void barrier(const Place& place);
int barrier_or(int predicate, const Place& place);  // a barrier; whether any thread brought something but 0

// A warp operation: every lane of `mask` hands in `size` bytes at `payload`; the last to arrive calls
// apply(payloads), an array of 32 pointers (null for lanes outside the mask), which may change them; then each lane
// gets its own bytes back.
using Apply = void (*)(void* const* payloads, unsigned mask, const void* argument);
void warp_operation(unsigned mask, void* payload, size_t size, Apply apply, const void* argument, const Place& place);

// The calling thread goes on when condition(argument) is true and its turn has come.
void wait_until(bool (*condition)(const void*), const void* argument, const Place& place);
// What is done by nobody's thread: at any time from now on, at the latest when no thread can run.
void happens_later(std::function<void()> event);

// Asynchronous copies of the calling thread: of `size` bytes `given` are copied, the others are 0.
void copy_later(void* to, const void* from, size_t size, size_t given);
void commit_copies();
void wait_for_copies(size_t pending);  // until at most so many groups have not arrived

// Runs body() once for every thread of every block of the grid.
void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body);

// The order in which threads and blocks run follows this seed.
void seed(uint64_t value);

// What hopper.cpp looks after: called when a block begins, when one of its threads ends, and when all have.
void block_begins();
void thread_ends();
void block_ends(size_t events);  // so many have not happened

[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulator
