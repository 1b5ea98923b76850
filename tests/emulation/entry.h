// How Python calls a kernel, and where the checks that the compiler puts into it report to.
#pragma once

namespace emulator {

// ctypes' view of a launch: one address and one size for every argument.
struct Request {
  unsigned blocks;
  unsigned threads;
  EmulatedWord seed;
  unsigned count;
  const void* const* arguments;
  const EmulatedWord* sizes;
};

template <typename... P>
struct Call {
  void (*kernel)(P...);
  const void* const* arguments;

  struct Invocation {
    Invocation(void (*kernel)(P...), const P&... parameters) { kernel(parameters...); }
  };

  static void run(const void* self) {
    const Call& call = *static_cast<const Call*>(self);
    [[maybe_unused]] const void* const* next = call.arguments;
    Invocation{call.kernel, *static_cast<const P*>(*next++)...};  // braces order the evaluations
  }
};

// Null, or what went wrong. The types of the parameters come from the kernel's own type.
template <typename... P>
const char* launch(const char* name, void (*kernel)(P...), const Request& request) {
  static_assert((__is_trivially_copyable(P) && ...), "CUDA copies parameters byte by byte");
  static_assert((sizeof(P) + ... + 0) <= 4096, "CUDA allows 4 KiB of parameters");
  static char message[256];
  const EmulatedWord sizes[] = {sizeof(P)..., 0};
  if (request.count != sizeof...(P)) {
    __builtin_snprintf(message, sizeof message, "%s takes %d arguments, got %u", name,
                       int(sizeof...(P)), request.count);
    return message;
  }
  for (unsigned i = 0; i < request.count; ++i) {
    if (request.sizes[i] == sizes[i]) continue;
    __builtin_snprintf(message, sizeof message, "argument %u of %s has %llu bytes, got %llu", i,
                       name, sizes[i], request.sizes[i]);
    return message;
  }
  const Call<P...> call{kernel, request.arguments};
  const EmulatedLaunch wanted{name,     request.blocks, request.threads, request.seed,
                              call.run, &call,          &shared_objects};
  return emulator_launch(&wanted);
}

}  // namespace emulator

#define EMULATOR_ENTRY(kernel)                                                         \
  extern "C" const char* emulator_entry_##kernel(const ::emulator::Request* request) { \
    return ::emulator::launch(#kernel, &kernel, *request);                             \
  }

// ---- -fsanitize ----------------------------------------------------------------------------
// The compiler calls these where the sanitizers' library would print a message or end the process.
// All descriptions of a problem begin with its place; what follows depends on the kind.

struct SanitizedPlace {
  const char* file;
  unsigned line;
  unsigned column;
};

struct SanitizedAccess {
  SanitizedPlace place;
  const void* type;
  unsigned char log2_alignment;
};

#define EMULATOR_SANITIZER(kind) \
  extern "C" __attribute__((visibility("hidden"), used)) void __ubsan_handle_##kind

EMULATOR_SANITIZER(type_mismatch_v1)(SanitizedAccess* access, EmulatedWord address) {
  const int line = int(access->place.line);
  if (address == 0) emulator_fail(line, "access through a null pointer");
  emulator_fail(line, "misaligned address 0x%llx: this access needs a multiple of %d", address,
                1 << access->log2_alignment);
}
EMULATOR_SANITIZER(out_of_bounds)(SanitizedPlace* place, EmulatedWord index) {
  emulator_fail(int(place->line), "array index %lld is out of bounds", (long long)index);
}
EMULATOR_SANITIZER(shift_out_of_bounds)(SanitizedPlace* place, EmulatedWord, EmulatedWord) {
  emulator_fail(int(place->line), "shift by a negative number or by the type's width");
}
EMULATOR_SANITIZER(divrem_overflow)(SanitizedPlace* place, EmulatedWord, EmulatedWord) {
  emulator_fail(int(place->line), "integer division by zero, or with overflow");
}
EMULATOR_SANITIZER(float_cast_overflow)(SanitizedPlace* place, EmulatedWord) {
  emulator_fail(int(place->line), "a float that does not fit the integer type it is cast to");
}
#define EMULATOR_OVERFLOW(operation)                                                             \
  EMULATOR_SANITIZER(operation##_overflow)(SanitizedPlace * place, EmulatedWord, EmulatedWord) { \
    emulator_fail(int(place->line), "signed integer overflow (" #operation ")");                 \
  }
EMULATOR_OVERFLOW(add)
EMULATOR_OVERFLOW(sub)
EMULATOR_OVERFLOW(mul)
EMULATOR_SANITIZER(negate_overflow)(SanitizedPlace* place, EmulatedWord) {
  emulator_fail(int(place->line), "signed integer overflow (negation)");
}
