#include "head_attention.h"

namespace ssd_operators {

HeadAttention const& head_attention() {
#if defined(SSD_OPERATORS_ONLY)
    return SSD_OPERATORS_ONLY;
#else
#if defined(SSD_OPERATORS_X86)
    __builtin_cpu_init();
    static bool const has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl");
    static bool const has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                                 __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (has_avx512) {
        return avx512_attention;
    }
    if (has_avx2) {
        return avx2_attention;
    }
#endif
    return baseline_attention;
#endif
}

}  // namespace ssd_operators
