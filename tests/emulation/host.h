// What the runtime needs of the operating system: stacks, and accesses that it refuses.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>

#include <cstddef>
#include <vector>

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kStackGuard = 4096;
constexpr size_t kColors = 32;  // tops of stacks differ, or they would share a few cache sets
constexpr size_t kColorBytes = 64;
constexpr size_t kUsableStack = kStackBytes - kStackGuard - kColors * kColorBytes;

// Stacks stay for the next launch: mapping 512 of them takes longer than running a block.
class Stacks {
 public:
  unsigned char* top(size_t i) const { return bases_[i] + kStackBytes - i % kColors * kColorBytes; }

  bool reserve(size_t count) {
    while (bases_.size() < count) {
      void* base =
          mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
      if (base == MAP_FAILED) return false;
      mprotect(base, kStackGuard, PROT_NONE);
      bases_.push_back(static_cast<unsigned char*>(base));
    }
    return true;
  }

 private:
  std::vector<unsigned char*> bases_;
};

// While one exists, an access of the launching thread to memory that is not there calls a function
// that leaves the kernel, instead of ending the process.
class BadAccessTrap {
 public:
  using Handler = void (*)(const void* address);

  explicit BadAccessTrap(Handler handler) {
    handler_ = handler;
    owner_ = pthread_self();
    static unsigned char stack[64 * 1024];  // a full stack cannot hold the handler's frame
    stack_t alternate = {};
    alternate.ss_sp = stack;
    alternate.ss_size = sizeof stack;
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler does not return
    sigaction(SIGSEGV, &action, &old_actions_[0]);
    sigaction(SIGBUS, &action, &old_actions_[1]);
  }

  ~BadAccessTrap() {
    sigaction(SIGSEGV, &old_actions_[0], nullptr);
    sigaction(SIGBUS, &old_actions_[1], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

  BadAccessTrap(const BadAccessTrap&) = delete;
  BadAccessTrap& operator=(const BadAccessTrap&) = delete;

 private:
  static void on_signal(int number, siginfo_t* information, void*) {
    if (pthread_equal(pthread_self(), owner_)) handler_(information->si_addr);
    signal(number, SIG_DFL);  // some other thread's mistake: the access repeats and ends all
  }

  static inline Handler handler_;
  static inline pthread_t owner_;
  stack_t old_stack_;
  struct sigaction old_actions_[2];
};
