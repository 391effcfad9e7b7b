// Stands in for bpe.cpp where the library is built without Oniguruma.
#include "failure.h"
#include "text_encoder.h"

namespace ssd_runtime {

std::unique_ptr<TextEncoder> open_text_encoder(nlohmann::ordered_json const&,
                                               std::vector<AddedToken>) {
    throw Failure(SSD_UNAVAILABLE,
                  "this ssd_runtime was built without a tokenizer: give token ids (`ssd-export "
                  "prompts`), or build it with Oniguruma (libonig-dev)");
}

}  // namespace ssd_runtime
