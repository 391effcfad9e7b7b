#include "kernels.h"

#if defined(SSD_OPERATORS_X86) && !defined(SSD_OPERATORS_ONLY)
#include <cpuid.h>
#endif

namespace ssd_operators {
namespace {

#if defined(SSD_OPERATORS_X86) && !defined(SSD_OPERATORS_ONLY)
// Clang's __builtin_cpu_supports does not know the name of this one.
bool has_f16c() {
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) != 0 && (ecx & bit_F16C) != 0;
}
#endif

#define SSD_KERNELS_OF(set)                                                               \
    Kernels {                                                                             \
        set::attend, set::write_row, set::turn, set::lowest, set::least, set::gated_silu, \
            set::panel_columns(), set::pack, set::multiply, set::fill_noise, set::draw,   \
            set::measure, set::finish, #set                                               \
    }

Kernels chosen() {
#if defined(SSD_OPERATORS_ONLY)
    return SSD_KERNELS_OF(SSD_OPERATORS_ONLY);
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
    if (has_avx512) {
        return SSD_KERNELS_OF(avx512);
    }
    if (has_avx2) {
        return SSD_KERNELS_OF(avx2);
    }
#endif
    return SSD_KERNELS_OF(baseline);
#endif
}

}  // namespace

Kernels const& kernels() {
    static Kernels const best = chosen();
    return best;
}

}  // namespace ssd_operators
