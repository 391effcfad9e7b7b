// preview BUNDLE PROMPT: the image grows in a terminal with 24-bit color, two pixels a character.
#include <algorithm>
#include <cstdio>

#include "ssd_runtime/ssd_runtime.hpp"

namespace {

constexpr uint32_t columns = 48;

void draw(ssd_row_event const& event) {
    auto const pixel = [&event](uint32_t column, uint32_t line) {
        uint32_t const x = column * event.width / columns;
        uint32_t const y = std::min(line * event.height / columns, event.height - 1);
        return event.pixels + (size_t{y} * event.width + x) * 3;
    };
    for (uint32_t line = 0; line < columns; line += 2) {
        for (uint32_t column = 0; column < columns; ++column) {
            uint8_t const* const top = pixel(column, line);
            uint8_t const* const low = pixel(column, line + 1);
            std::printf("\x1b[38;2;%d;%d;%dm\x1b[48;2;%d;%d;%dm\u2580", top[0], top[1], top[2],
                        low[0], low[1], low[2]);
        }
        std::printf("\x1b[0m\n");
    }
}

}  // namespace

int main(int argc, char** argv) try {
    if (argc != 3) {
        std::fprintf(stderr, "usage: preview BUNDLE PROMPT\n");
        return 2;
    }
    ssd::Model const model(argv[1]);
    ssd::Request request(model, {argv[2]});
    request.params.preview = 1;
    ssd::Generation generation(model, request);
    for (bool done = false; !done;) {
        ssd_row_event const event = generation.step_row();
        if (event.row > 0) {
            std::printf("\x1b[%uA", columns / 2);  // back to the image's first line
        }
        draw(event);
        done = event.done != 0;
    }
    return 0;
} catch (ssd::Error const& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
}
