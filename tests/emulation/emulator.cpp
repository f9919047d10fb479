// See emulator.h.
#include "emulator.h"

#include "stack_switch.h"

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#endif

namespace emulator {
namespace {

constexpr size_t kSharedAlignment = 1024;
constexpr size_t kStackBytes = 256 << 10;  // address space; the pages are used only where a thread touches them
constexpr size_t kUnreturnedBytes = 4096;  // more than the frames take that a thread leaves when it ends

enum class State { ready, at_barrier, at_warp_operation, at_condition, ended };

struct Copy {
  void* to;
  const void* from;
  size_t size, given;  // bytes; what is not given is 0
};

struct Fiber {
  std::deque<std::vector<Copy>> copies;  // asynchronous ones: committed groups, then the open one
  Thread self;
  State state;
  Place place;
  unsigned mask;  // of the warp operation
  void* payload;
  size_t size;
  bool (*condition)(const void*);
  const void* argument;  // of the condition
  char* stack;           // lowest address
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
};

struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;  // grown to the largest block so far, stacks are reused
  Fiber* current = nullptr;
#if defined(__x86_64__)
  void* scheduler_stack = nullptr;
#else
  ucontext_t scheduler;
#endif
  const void* scheduler_stack_bottom = nullptr;
  size_t scheduler_stack_size = 0;
  const std::function<void()>* body = nullptr;
  dim3 grid, block;
  uint3 block_index{};
  std::unique_ptr<unsigned char, decltype(&free)> shared{nullptr, &free};
  size_t shared_size = 0;
  long launches = 0;
  std::mt19937_64 random{0};
  bool running = false;
  std::vector<std::function<void()>> events;  // that may happen at any time
  bool any = false, voted = false;            // of barrier_or: of the open vote, of the last one
};

Machine& machine() {
  static Machine instance;
  return instance;
}

void switch_to_scheduler(bool ending) {
  Machine& m = machine();
  Fiber* self = m.current;
#ifdef EMULATOR_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(ending ? nullptr : &fake, m.scheduler_stack_bottom, m.scheduler_stack_size);
#endif
#if defined(__x86_64__)
  emulator_switch(&self->stack_pointer, m.scheduler_stack);
#else
  swapcontext(&self->context, &m.scheduler);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake, &m.scheduler_stack_bottom, &m.scheduler_stack_size);
#endif
}

void fiber_main() {
  Machine& m = machine();
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &m.scheduler_stack_bottom, &m.scheduler_stack_size);
#endif
  (*m.body)();
  for (const auto& group : m.current->copies) {
    if (!group.empty()) fail("thread %d ended before its asynchronous copies had arrived", m.current->self.linear);
  }
  thread_ends();
  m.current->state = State::ended;
  switch_to_scheduler(true);
  abort();  // an ended fiber is never resumed
}

void start(Fiber& fiber) {
  fiber.copies.assign(1, {});
#ifdef EMULATOR_ASAN
  // The thread before this one never returned from its first two frames; all others cleared what they had poisoned.
  __asan_unpoison_memory_region(fiber.stack + kStackBytes - kUnreturnedBytes, kUnreturnedBytes);
#endif
  fiber.state = State::ready;
#if defined(__x86_64__)
  auto* top = reinterpret_cast<uintptr_t*>(fiber.stack + kStackBytes);
  *--top = 0;                                         // keeps the stack aligned as after a call
  *--top = reinterpret_cast<uintptr_t>(&fiber_main);  // where the first switch returns to
  for (int saved = 0; saved < 6; ++saved) *--top = 0;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack = {fiber.stack, 0, kStackBytes};
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, &fiber_main, 0);
#endif
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.current = &fiber;
#ifdef EMULATOR_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, fiber.stack, kStackBytes);
#endif
#if defined(__x86_64__)
  emulator_switch(&m.scheduler_stack, fiber.stack_pointer);
#else
  swapcontext(&m.scheduler, &fiber.context);
#endif
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  m.current = nullptr;
}

Fiber& fiber_at(size_t i) {
  auto& fibers = machine().fibers;
  while (fibers.size() <= i) {
    auto fiber = std::make_unique<Fiber>();
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) fail("no memory for the stack of thread %zu", i);
    fiber->stack = static_cast<char*>(stack);
    fibers.push_back(std::move(fiber));
  }
  return *fibers[i];
}

void describe(const Fiber& fiber, char* text, size_t size) {
  const char* const state = fiber.state == State::ended   ? "has ended"
                            : fiber.state == State::ready ? "runs"
                                                          : "waits at";
  const bool waits = fiber.state != State::ended && fiber.state != State::ready;
  snprintf(text, size, "thread (%u, %u, %u) %s%s%s", fiber.self.index.x, fiber.self.index.y, fiber.self.index.z, state,
           waits ? " " : "", waits ? fiber.place.what : "");
  if (waits) snprintf(text + strlen(text), size - strlen(text), " (%s:%d)", fiber.place.file, fiber.place.line);
}

[[noreturn]] void fail_with(const Fiber& waiting, const Fiber& other, const char* what) {
  char first[256], second[256];
  describe(waiting, first, sizeof first);
  describe(other, second, sizeof second);
  fail("%s: %s, but %s", what, first, second);
}

// Opens the barrier if every thread waits at it; an error if one has ended.
bool open_barrier(size_t count) {
  auto& fibers = machine().fibers;
  const Fiber* waiting = nullptr;
  const Fiber* ended = nullptr;
  for (size_t i = 0; i < count; ++i) {
    if (fibers[i]->state == State::at_barrier) waiting = fibers[i].get();
    else if (fibers[i]->state == State::ended) ended = fibers[i].get();
    else return false;
  }
  if (waiting && ended) fail_with(*waiting, *ended, "a part of the block reached a barrier");
  for (size_t i = 0; waiting && i < count; ++i) {
    if (fibers[i]->place.line != waiting->place.line || fibers[i]->place.file != waiting->place.file)
      fail_with(*waiting, *fibers[i], "the block waits at different barriers");
  }
  machine().voted = std::exchange(machine().any, false);
  for (size_t i = 0; waiting && i < count; ++i) fibers[i]->state = State::ready;
  return waiting != nullptr;
}

[[noreturn]] void fail_stuck(size_t count) {
  auto& fibers = machine().fibers;
  const Fiber* waiting = nullptr;
  for (size_t i = 0; i < count && !waiting; ++i)
    if (fibers[i]->state == State::at_warp_operation) waiting = fibers[i].get();
  if (!waiting) {
    for (size_t i = 0; i < count; ++i)
      if (fibers[i]->state == State::at_barrier || fibers[i]->state == State::at_condition) waiting = fibers[i].get();
    fail_with(*waiting, *waiting, "nothing can run");
  }
  const size_t first = static_cast<size_t>(waiting->self.linear) / kWarp * kWarp;
  for (size_t lane = 0; lane < kWarp && first + lane < count; ++lane) {
    const Fiber& other = *fibers[first + lane];
    const bool same = other.state == State::at_warp_operation && other.place.line == waiting->place.line;
    if ((waiting->mask >> lane & 1) && !same) fail_with(*waiting, other, "a part of its mask reached a warp operation");
  }
  fail_with(*waiting, *waiting, "the mask of a warp operation names lanes that do not exist");
}

// One of the events that are due, any one.
void let_happen() {
  auto& events = machine().events;
  std::swap(events[machine().random() % events.size()], events.back());
  const auto event = std::move(events.back());
  events.pop_back();
  event();
}

void run_block(size_t count) {
  Machine& m = machine();
  block_begins();
  memset(m.shared.get(), 0xff, m.shared_size);  // NaN in every float format
  for (size_t i = 0; i < count; ++i) {
    Fiber& fiber = fiber_at(i);
    fiber.self.linear = static_cast<int>(i);
    fiber.self.index = {unsigned(i % m.block.x), unsigned(i / m.block.x % m.block.y),
                        unsigned(i / m.block.x / m.block.y)};
    start(fiber);
  }
  std::vector<size_t> order(count);
  std::iota(order.begin(), order.end(), size_t{0});
  while (true) {
    std::shuffle(order.begin(), order.end(), m.random);
    bool ran = false;
    for (size_t i : order) {
      Fiber& fiber = *m.fibers[i];
      if (fiber.state == State::at_condition && fiber.condition(fiber.argument)) fiber.state = State::ready;
      if (fiber.state != State::ready) continue;
      resume(fiber);
      ran = true;
    }
    const auto ended = [&](size_t i) { return m.fibers[i]->state == State::ended; };
    if (std::all_of(order.begin(), order.end(), ended)) return block_ends(m.events.size());
    if (!m.events.empty() && (!ran || m.random() % 4 == 0)) let_happen(), ran = true;
    if (ran || open_barrier(count)) continue;
    fail_stuck(count);
  }
}

}  // namespace

void fail(const char* format, ...) {
  const Machine& m = machine();
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "CUDA emulation, block (%u, %u, %u): ", m.block_index.x, m.block_index.y, m.block_index.z);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  abort();
}

extern "C" long emulator_launches() { return machine().launches; }

void seed(uint64_t value) { machine().random.seed(value); }

const Thread& thread() { return machine().current->self; }
const uint3& block_index() { return machine().block_index; }
const dim3& block_size() { return machine().block; }
const dim3& grid_size() { return machine().grid; }
void* shared_memory() { return machine().shared.get(); }
unsigned shared_offset(const void* address) {
  const auto offset = static_cast<size_t>(static_cast<const unsigned char*>(address) - machine().shared.get());
  if (offset >= machine().shared_size) fail("an address is not in shared memory");
  return static_cast<unsigned>(offset);
}

void barrier(const Place& place) {
  Fiber& self = *machine().current;
  self.state = State::at_barrier;
  self.place = place;
  switch_to_scheduler(false);
}

int barrier_or(int predicate, const Place& place) {
  machine().any = machine().any || predicate != 0;
  barrier(place);
  return machine().voted;
}

void wait_until(bool (*condition)(const void*), const void* argument, const Place& place) {
  Fiber& self = *machine().current;
  self.state = State::at_condition;
  self.place = place;
  self.condition = condition, self.argument = argument;
  switch_to_scheduler(false);
}

void happens_later(std::function<void()> event) { machine().events.push_back(std::move(event)); }

void copy_later(void* to, const void* from, size_t size, size_t given) {
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    fail("a copy of %zu bytes is not aligned", size);
  machine().current->copies.back().push_back({to, from, size, given});
}

void commit_copies() { machine().current->copies.emplace_back(); }

void wait_for_copies(size_t pending) {
  auto& copies = machine().current->copies;
  while (copies.size() > pending + 1) {
    for (const Copy& copy : copies.front()) {
      memset(copy.to, 0, copy.size);
      memcpy(copy.to, copy.from, copy.given);
    }
    copies.pop_front();
  }
}

void warp_operation(unsigned mask, void* payload, size_t size, Apply apply, const void* argument, const Place& place) {
  Machine& m = machine();
  Fiber& self = *m.current;
  const int lane = self.self.linear % kWarp;
  if (!(mask >> lane & 1))
    fail("%s (%s:%d): lane %d is not in its own mask %08x", place.what, place.file, place.line, lane, mask);
  if (size > kLargestPayload) fail("%s: %zu bytes a lane", place.what, size);
  self.place = place;
  self.mask = mask;
  self.payload = payload;
  self.size = size;
  self.state = State::at_warp_operation;

  const size_t first = static_cast<size_t>(self.self.linear - lane);
  const size_t count = size_t{m.block.x} * m.block.y * m.block.z;
  void* payloads[kWarp] = {};
  for (size_t other = 0; other < kWarp; ++other) {
    if (!(mask >> other & 1)) continue;
    if (first + other >= count) {
      fail("%s (%s:%d): mask %08x names lane %zu, which the block does not have", place.what, place.file, place.line,
           mask, other);
    }
    const Fiber& fiber = *m.fibers[first + other];
    if (fiber.state != State::at_warp_operation) {
      if (fiber.state == State::ended) fail_with(self, fiber, "a part of its mask reached a warp operation");
      switch_to_scheduler(false);  // whoever arrives last carries the operation out
      return;
    }
    if (fiber.mask != mask || fiber.place.line != place.line || fiber.size != size)
      fail_with(self, fiber, "lanes of one warp are at different warp operations");
    payloads[other] = fiber.payload;
  }
  apply(payloads, mask, argument);
  for (size_t other = 0; other < kWarp; ++other)
    if (mask >> other & 1) m.fibers[first + other]->state = State::ready;
}

void launch(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& body) {
  Machine& m = machine();
  const size_t count = size_t{block.x} * block.y * block.z;
  if (m.running) fail("a launch inside a launch");
  if (count == 0 || count > kMaxThreads) fail("a block of %zu threads", count);
  if (shared_bytes > kMaxShared) fail("%zu bytes of shared memory", shared_bytes);
  if (size_t{grid.x} * grid.y * grid.z == 0 || grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu)
    fail("a grid of %u x %u x %u blocks", grid.x, grid.y, grid.z);
  m.running = true;
  m.grid = grid;
  m.block = block;
  m.body = &body;
  void* shared = nullptr;  // of the exact size, so that AddressSanitizer sees its ends
  if (posix_memalign(&shared, kSharedAlignment, shared_bytes) != 0)
    fail("no memory for %zu bytes of shared memory", shared_bytes);
  m.shared.reset(static_cast<unsigned char*>(shared));
  m.shared_size = shared_bytes;
  ++m.launches;
  std::vector<size_t> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), size_t{0});
  std::shuffle(order.begin(), order.end(), m.random);
  for (size_t i : order) {
    m.block_index = {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y)};
    run_block(count);
  }
  m.running = false;
}

}  // namespace emulator
