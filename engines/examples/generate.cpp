// generate_cpp BUNDLE PROMPT OUT.png: one image.
#include <iostream>

#include "ssd_runtime/ssd_runtime.hpp"

int main(int argc, char** argv) try {
    if (argc != 4) {
        std::cerr << "usage: generate_cpp BUNDLE PROMPT OUT.png\n";
        return 2;
    }
    ssd::Model const model(argv[1]);
    ssd::Request request(model, {argv[2]});
    request.params.seed = 0;
    request.on_row = [](ssd_row_event const& event) {
        std::cerr << "\rrow " << event.row + 1 << " of " << event.num_rows;
        return true;  // false cancels; an exception reaches the caller of run()
    };
    ssd::Generation generation(model, request);
    generation.run();

    ssd::Images const images = generation.images();
    ssd_error error;
    ssd::check(
        ssd_write_png(argv[3], images.pixels, images.width, images.height, nullptr, 0, &error),
        error);
    ssd_cache_report const cache = generation.cache_bytes();
    std::cerr << "\r" << argv[3] << ": KV cache of " << cache.bytes << " bytes\n";
    return 0;
} catch (ssd::Error const& error) {
    std::cerr << "error: " << error.what() << "\n";
    return 1;
}
