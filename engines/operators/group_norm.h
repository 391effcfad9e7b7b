// What stands between two convolutions of the image decoder, channels last.
#pragma once

#include <cstdint>

namespace ssd_operators {

// Channels are a multiple of it: the widest vector of any instruction set.
constexpr int channels_of_vector = 16;

// Numbers [places, channels]: x + scale * code + offset, of which x or the codes may be null. Where
// scale is null a number is its code.
struct Feature {
    float const* x;
    uint8_t const* codes;
    float const *scale, *offset;  // [channels]
};

// Where numbers go after factor * number + shift: through SiLU or not, then to float or, where
// inverse is not null, to round(inverse * number) + zero_point in uint8. plane: 0 for channels
// last, else the distance of two channels, float alone.
struct Finish {
    float const *factor, *shift, *inverse;  // [channels]
    float zero_point;
    bool silu;
    int64_t plane;
};

}  // namespace ssd_operators
