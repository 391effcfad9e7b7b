#include "kernels.h"

namespace ssd_operators {
namespace {

#define SSD_KERNELS_OF(set)                                                                        \
    Kernels {                                                                                      \
        set::attend, set::lowest, set::gated_silu, set::panel_columns(), set::pack, set::multiply, \
            set::fill_noise, set::draw, set::measure, set::finish, #set                            \
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
                          __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
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
