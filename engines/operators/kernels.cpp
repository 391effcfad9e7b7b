#include "kernels.h"

#if defined(SSD_OPERATORS_X86) && !defined(SSD_OPERATORS_ONLY)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ssd_operators {
namespace {

#if defined(SSD_OPERATORS_X86) && !defined(SSD_OPERATORS_ONLY)
// Clang's __builtin_cpu_supports does not know the names of these.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}

// Tiles, which Linux gives to a process that asks for them.
bool has_amx() {
#if defined(__linux__)
    constexpr unsigned tiles = 1U << 24, int8 = 1U << 25;
    constexpr int ask_for_permission = 0x1023, state_of_tiles = 18;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0 && (edx & tiles) != 0 &&
           (edx & int8) != 0 && syscall(SYS_arch_prctl, ask_for_permission, state_of_tiles) == 0;
#else
    return false;
#endif
}

bool has_avx_vnni() {
    constexpr unsigned bit = 1U << 4;
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax & bit) != 0;
}
#endif

#define SSD_KERNELS_OF(set, codes)                                                              \
    Kernels {                                                                                   \
        set::attend, set::write_row, set::turn, set::lowest, set::least, set::gated_silu,       \
            set::panel_columns(), set::pack, set::multiply, codes::few_rows(), codes::panel_of, \
            codes::code_row, codes::multiply_codes, codes::gather_parts, set::fill_noise,       \
            set::draw, set::measure, set::finish, #codes                                        \
    }

Kernels chosen() {
#if defined(SSD_OPERATORS_ONLY)
    return SSD_KERNELS_OF(SSD_OPERATORS_ONLY, SSD_CODES_ONLY);
#else
#if defined(SSD_OPERATORS_X86)
    __builtin_cpu_init();
    bool const has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl");
    bool const has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                          has_f16c() && __builtin_cpu_supports("bmi") &&
                          __builtin_cpu_supports("bmi2");
    if (has_avx512 && __builtin_cpu_supports("avx512vnni") && has_amx()) {
        return SSD_KERNELS_OF(avx512, avx512amx);
    }
    if (has_avx512 && __builtin_cpu_supports("avx512vnni")) {
        return SSD_KERNELS_OF(avx512, avx512vnni);
    }
    if (has_avx512) {
        return SSD_KERNELS_OF(avx512, avx512);
    }
    if (has_avx2 && has_avx_vnni()) {
        return SSD_KERNELS_OF(avx2, avxvnni);
    }
    if (has_avx2) {
        return SSD_KERNELS_OF(avx2, avx2);
    }
#endif
    return SSD_KERNELS_OF(baseline, baseline);
#endif
}

}  // namespace

Kernels const& kernels() {
    static Kernels const best = chosen();
    return best;
}

}  // namespace ssd_operators
