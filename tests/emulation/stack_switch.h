// How one stack gives way to another: by hand where we know how, by the system elsewhere.
#pragma once

#if defined(__x86_64__)
// Saves what the System V ABI asks a callee to save, and goes on with the other stack. Switching this way takes a few
// nanoseconds; swapcontext makes a system call for the signal mask each time.
extern "C" void emulator_switch(void** save_stack, void* load_stack);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch, .-emulator_switch
)");
#else
#include <ucontext.h>
#endif
