// Contexts of execution on stacks of their own, and the switch between them. ucontext would do it
// everywhere, but makes two system calls a switch, and a block of 512 threads needs thousands.
#pragma once

#if (defined(__x86_64__) || defined(__aarch64__)) && !defined(EMULATOR_UCONTEXT)

struct Context {
  void* stack_pointer;
};

// Saves what a called function must preserve on the stack of `from`, restores the same of `to` and
// goes on there. It ends with a jump instead of a return, which a processor would mispredict.
extern "C" void emulator_switch(Context* from, Context* to) asm("emulator_switch");

#ifdef __x86_64__
asm(R"(
.text
.balign 16
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmpq *%rcx
)");
constexpr int kSavedWords = 8;  // six registers, the entry, and a return address for the entry
constexpr int kSavedEntry = 6;  // where emulator_switch takes its target from
#else
asm(R"(
.text
.balign 16
emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  ldr x9, [x1]
  mov sp, x9
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  br x30
)");
constexpr int kSavedWords = 20;
constexpr int kSavedEntry = 11;  // x30
#endif

inline void switch_context(Context& from, Context& to) { emulator_switch(&from, &to); }

// `top` is a multiple of 16. The entry never returns.
inline void prepare_context(Context& context, unsigned char* /*bottom*/, unsigned char* top,
                            void (*entry)()) {
  void** saved = reinterpret_cast<void**>(top) - kSavedWords;
  for (int i = 0; i < kSavedWords; ++i) saved[i] = nullptr;
  saved[kSavedEntry] = reinterpret_cast<void*>(entry);
  context.stack_pointer = saved;
}

#else

#include <ucontext.h>

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prepare_context(Context& context, unsigned char* bottom, unsigned char* top,
                            void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = bottom;
  context.uc_stack.ss_size = static_cast<size_t>(top - bottom);
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#endif
